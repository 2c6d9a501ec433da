//! The connection for settling. Owns what waits to be written, and who reads what arrives.
//!
//! ```text
//!  publish ─▶ queue ─▶ output ─▶ kernel ─▶ NATS ─▶ input ─▶ reader of the subscription
//!             (bounded)   └─ late messages are left out just before
//! ```
//! Invariants:
//! 1. The connection is used once. When it is lost or given up, its queue and its output end with it, and
//!    nothing of them is written later.
//! 2. A message is not written after its deadline, except up to 32 that were on their way to the kernel.
//! 3. One task reads and writes. Nobody waits for another thread.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker, ready},
    time::Instant,
};

use async_nats::ServerInfo;
use bytes::BytesMut;
use tokio::{
    io::AsyncReadExt as _,
    sync::{Notify, oneshot},
    time::timeout_at,
};
use tokio_util::sync::CancellationToken;

use super::{
    denials::Denials,
    dial::{self, ByteStream, DialError, Dialed},
    protocol::{self, ServerMessage, ServerOp, take_op},
    settings::Settings,
};
use crate::{
    clock::{self, Deadline, Reading},
    lock::lock,
    metrics::NatsMeter,
};

/// Most bytes that wait for the connection. A larger message waits until nothing else does.
const MAX_QUEUED: usize = 256 << 10;
/// Messages that are handed to the kernel before the deadlines of the others are looked at. A process that is
/// stopped and continues writes these, however late that is.
const MAX_AT_ONCE: usize = 32;
/// Bytes that are read at once.
const READ_SIZE: usize = 32 << 10;

/// Takes the messages of a subscription, with the clocks at their arrival. It must not block.
type MessageReader = Box<dyn FnMut(ServerMessage, &Reading) + Send>;

/// A connection that works until it is lost. It never reconnects.
pub(super) struct SettlingConnection {
    /// The id of the server, as it described itself first.
    pub(super) server_id: String,
    pub(super) version: String,
    /// The largest message that the server accepts, in bytes.
    pub(super) max_payload: u64,
    /// A subject that nobody else uses.
    pub(super) inbox: String,
    /// Cancelled when the connection is gone, or given up.
    pub(super) lost: CancellationToken,
    /// Cancelled when the server has announced that it will stop (its lame duck mode). The server
    /// continues serving for a while.
    pub(super) leaving: CancellationToken,
    pub(super) denials: Denials,
    pub(super) meter: NatsMeter,
    server: Mutex<ServerInfo>,
    queue: Mutex<Queue>,
    /// Told when the queue has room, and when everything is written.
    drained: Notify,
    readers: Mutex<BTreeMap<u64, MessageReader>>,
}

/// What waits to be written.
#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Where the first message begins in `bytes`.
    start: usize,
    /// Where each message ends in `bytes`, and its deadline.
    ends: VecDeque<(usize, Option<Deadline>)>,
    /// Waiting for the answers to `PING`, in their order.
    pings: VecDeque<oneshot::Sender<()>>,
    last_sid: u64,
    /// The line has bytes that are not written yet.
    writing: bool,
    closed: bool,
    /// Wakes the line, which waits for the queue.
    line: Option<Waker>,
}

impl Queue {
    /// Notes that `bytes` has one more message.
    fn end(&mut self, by: Option<Deadline>) {
        self.ends.push_back((self.bytes.len(), by));
        if let Some(line) = self.line.take() {
            line.wake();
        }
    }

    /// Whether the kernel has everything, or nothing will be written any more.
    fn is_written(&self) -> bool {
        self.closed || self.ends.is_empty() && !self.writing
    }

    fn is_full(&self, more: usize) -> bool {
        !self.ends.is_empty() && self.bytes.len() - self.start + more > MAX_QUEUED
    }

    /// Appends the next messages to `output`, without those that are late.
    fn take(&mut self, output: &mut Vec<u8>, now: &Reading) {
        for _ in 0..MAX_AT_ONCE {
            let Some((end, by)) = self.ends.pop_front() else { break };
            if !by.is_some_and(|by| by.passed(now)) {
                output.extend_from_slice(&self.bytes[self.start..end]);
            }
            self.start = end;
        }
        if self.ends.is_empty() {
            self.bytes.clear();
            self.start = 0;
        }
    }
}

impl SettlingConnection {
    /// Connects to one of the servers. `role` names the connection in the server's own lists. Nothing is
    /// written or read before the line runs.
    pub(super) async fn make(
        settings: &Settings,
        role: &str,
        meter: &NatsMeter,
    ) -> Result<(Self, SettlingLine), DialError> {
        let dialed = dial::dial(settings, &format!("fetch-proxy {role}")).await?;
        let Dialed { stream, server, input } = dialed;
        let connection = Self {
            server_id: server.server_id.clone(),
            version: server.version.clone(),
            max_payload: server.max_payload as u64,
            inbox: dial::new_inbox(settings)?,
            lost: CancellationToken::new(),
            leaving: CancellationToken::new(),
            denials: Denials::new(settings, meter),
            meter: meter.clone(),
            server: Mutex::new(server),
            queue: Mutex::default(),
            drained: Notify::new(),
            readers: Mutex::default(),
        };
        Ok((connection, SettlingLine { stream, input, output: Vec::new(), written: 0 }))
    }

    /// The server, as it describes itself now.
    pub(super) fn server(&self) -> ServerInfo {
        lock(&self.server).clone()
    }

    /// Gives the connection up. Its queue never leaves.
    pub(super) fn end(&self) {
        let mut queue = self.queue();
        *queue = Queue { closed: true, ..Queue::default() };
        drop(queue);
        self.lost.cancel();
        self.drained.notify_waiters();
    }

    /// Hands one message to the connection, which writes it unless `by` passes before. Waits until `until` for
    /// room in the queue. `false`: the message will never leave.
    pub(super) async fn publish(
        &self,
        subject: &str,
        reply: Option<&str>,
        payload: &[u8],
        by: Option<Deadline>,
        until: Instant,
    ) -> bool {
        loop {
            let mut room = pin!(self.drained.notified());
            room.as_mut().enable();
            {
                let mut queue = self.queue();
                if queue.closed {
                    return false;
                }
                if !queue.is_full(subject.len() + payload.len()) {
                    let written = protocol::publish(&mut queue.bytes, subject, reply, payload);
                    if written {
                        queue.end(by);
                    }
                    return written;
                }
            }
            if timeout_at(until.into(), room).await.is_err() {
                return false;
            }
        }
    }

    /// Hands the messages of a subject to `reader`, until the end of the subscription.
    pub(super) fn subscribe(
        self: &Arc<Self>,
        subject: &str,
        reader: impl FnMut(ServerMessage, &Reading) + Send + 'static,
    ) -> SubjectSubscription {
        let mut queue = self.queue();
        queue.last_sid += 1;
        let sid = queue.last_sid;
        lock(&self.readers).insert(sid, Box::new(reader));
        if !queue.closed && protocol::subscribe(&mut queue.bytes, subject, sid) {
            queue.end(None);
        }
        drop(queue);
        SubjectSubscription { connection: self.clone(), sid }
    }

    /// Asks the server for an answer behind everything that was sent. The server handles a connection in
    /// order, so its answer shows that all of it has arrived. Pending for ever if the connection is lost.
    pub(super) async fn ping(&self) {
        let (told, answered) = oneshot::channel();
        {
            let mut queue = self.queue();
            if !queue.closed {
                queue.bytes.extend_from_slice(b"PING\r\n");
                queue.pings.push_back(told);
                queue.end(None);
            }
        }
        if answered.await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits until the kernel has everything that was handed over, or the connection is lost.
    pub(super) async fn written(&self) {
        loop {
            let mut drained = pin!(self.drained.notified());
            drained.as_mut().enable();
            if self.queue().is_written() {
                return;
            }
            drained.await;
        }
    }

    /// Moves what waits to `output`, which is written. `false`: nothing waits, and the line is woken later.
    fn take_queue(&self, output: &mut Vec<u8>, cx: &Context<'_>) -> bool {
        let mut queue = self.queue();
        let (had, has) = (queue.writing, !queue.ends.is_empty());
        queue.writing = has;
        if has {
            queue.take(output, &clock::reading());
        } else {
            queue.line = Some(cx.waker().clone());
        }
        drop(queue);
        if had || has {
            self.drained.notify_waiters();
        }
        has
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    /// Handles one operation of the server.
    fn handle(&self, op: ServerOp, at: &Reading) {
        match op {
            ServerOp::Message(message) => {
                if let Some(reader) = lock(&self.readers).get_mut(&message.sid) {
                    reader(message, at);
                }
            }
            ServerOp::Ping => {
                let mut queue = self.queue();
                if !queue.closed && !queue.is_full(0) {
                    queue.bytes.extend_from_slice(b"PONG\r\n");
                    queue.end(None);
                }
            }
            ServerOp::Pong => {
                let ping = self.queue().pings.pop_front();
                if let Some(ping) = ping {
                    let _ = ping.send(());
                }
            }
            ServerOp::Info(json) => {
                let Ok(server) = dial::read_info(&json) else { return };
                if server.lame_duck_mode {
                    self.leaving.cancel();
                }
                *lock(&self.server) = server;
            }
            ServerOp::Error(why) => {
                if !self.denials.take(&why) {
                    tracing::debug!(why, "NATS reports an error on the connection for settling");
                }
            }
            ServerOp::Ok => {}
        }
    }
}

/// A subscription, which ends when this is dropped.
pub(super) struct SubjectSubscription {
    connection: Arc<SettlingConnection>,
    sid: u64,
}

impl Drop for SubjectSubscription {
    fn drop(&mut self) {
        // A reader may hold what uses the connection, so it is dropped without the lock.
        let reader = lock(&self.connection.readers).remove(&self.sid);
        drop(reader);
        let mut queue = self.connection.queue();
        if !queue.closed {
            protocol::unsubscribe(&mut queue.bytes, self.sid);
            queue.end(None);
        }
    }
}

/// The bytes of a connection on their way. Whoever drops the line closes the connection.
pub(super) struct SettlingLine {
    stream: Box<dyn ByteStream>,
    input: BytesMut,
    /// What is written next, from `written` on.
    output: Vec<u8>,
    written: usize,
}

impl SettlingLine {
    /// Reads and writes until the connection is lost.
    pub(super) async fn run(self, connection: Arc<SettlingConnection>) {
        let lost = connection.lost.clone();
        // Also if this task is dropped.
        let _end = EndWhenDropped(connection.clone());
        lost.run_until_cancelled(RunningLine { line: self, connection }).await;
    }

    /// Reads all that is there. Ready when the connection is lost.
    fn poll_input(&mut self, connection: &SettlingConnection, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut at = None;
            loop {
                match take_op(&mut self.input) {
                    Ok(Some(op)) => connection.handle(op, at.get_or_insert_with(clock::reading)),
                    Ok(None) => break,
                    Err(why) => {
                        tracing::debug!(%why, "the connection for settling ends");
                        return Poll::Ready(());
                    }
                }
            }
            self.input.reserve(READ_SIZE);
            match ready!(pin!(self.stream.read_buf(&mut self.input)).poll(cx)) {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Poll::Ready(()),
            }
        }
    }

    /// Writes what waits. Ready when the connection is lost.
    fn poll_output(&mut self, connection: &SettlingConnection, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.written == self.output.len() {
                // Encrypted bytes can wait in the stream.
                if ready!(Pin::new(&mut *self.stream).poll_flush(cx)).is_err() {
                    return Poll::Ready(());
                }
                self.output.clear();
                self.written = 0;
                if !connection.take_queue(&mut self.output, cx) {
                    return Poll::Pending;
                }
                continue;
            }
            let rest = &self.output[self.written..];
            match ready!(Pin::new(&mut *self.stream).poll_write(cx, rest)) {
                Ok(count @ 1..) => self.written += count,
                Ok(0) | Err(_) => return Poll::Ready(()),
            }
        }
    }
}

struct EndWhenDropped(Arc<SettlingConnection>);

impl Drop for EndWhenDropped {
    fn drop(&mut self) {
        self.0.end();
    }
}

struct RunningLine {
    line: SettlingLine,
    connection: Arc<SettlingConnection>,
}

impl Future for RunningLine {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { line, connection } = &mut *self;
        // Whatever was given up is not written.
        if connection.lost.is_cancelled()
            || line.poll_input(connection, cx).is_ready()
            || line.poll_output(connection, cx).is_ready()
        {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}
