//! One Consume between its client and a replica: frames up and down, each in order and with a delay. The frames of the
//! client are the body of a real request, which tonic decodes. A frame of the replica is written when the task of its
//! body takes it, or a moment later.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use fetch_proxy::{
    grpc::FrameHolds,
    pb::{self, fetch_service_server::FetchService as _},
};
use futures_util::StreamExt as _;
use http_body::Frame;
use prost::Message as _;
use testkit::dice::Dice;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::sleep,
};
use tonic::{Request, Status, Streaming, codec::Codec as _};
use tonic_prost::ProstCodec;

use crate::{
    jetstream::Time,
    replica::Replica,
    roads::KEEPALIVE,
    watch::{FetchId, Room, Watch},
    world::World,
};

type Codec = ProstCodec<pb::ConsumeResponse, pb::ConsumeRequest>;

/// What comes down to the client.
pub enum Down {
    /// A frame, and when the replica has made it: its leases count from then.
    Frame(Box<pb::ConsumeResponse>, Time),
    /// The stream is over.
    End(Ended),
}

/// How a stream has ended for its client.
pub enum Ended {
    Done,
    Failed(Status),
    /// Its replica is gone, or the way to it.
    Lost,
}

/// The side of the client. Dropping it hangs up.
pub struct ClientStream {
    pub id: FetchId,
    world: Arc<World>,
    replica: Arc<Replica>,
    /// `None`: the client has half-closed the stream.
    up: Option<mpsc::UnboundedSender<pb::ConsumeRequest>>,
    down: mpsc::UnboundedReceiver<Down>,
    reads: watch::Sender<bool>,
    server: tokio::task::AbortHandle,
    call: u64,
}

/// The frames of a client as the body of its request.
struct Upward(mpsc::UnboundedReceiver<pb::ConsumeRequest>);

impl http_body::Body for Upward {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.poll_recv(cx).map(|frame| {
            let message = frame?.encode_to_vec();
            let mut bytes = BytesMut::with_capacity(5 + message.len());
            bytes.put_u8(0);
            bytes.put_u32(message.len() as u32);
            bytes.put_slice(&message);
            Some(Ok(Frame::data(bytes.freeze())))
        })
    }
}

impl ClientStream {
    /// Opens a stream with its first frame. `None`: nobody was reached.
    pub async fn open(
        (world, client): (&Arc<World>, u64),
        replica: &Arc<Replica>,
        first: pb::ConsumeRequest,
        dice: &mut Dice,
    ) -> Option<Self> {
        sleep(dice.millis(0..5)).await;
        if replica.gone.load(Ordering::Relaxed) || !passes(world, client, replica.place).await {
            return None;
        }
        let start = first.start.clone().unwrap_or_default();
        let now = world.net.now();
        let id = world.watch().stream_called(replica.side, &start, now);
        let (up, sent) = mpsc::unbounded_channel();
        let (arriving, arrives) = mpsc::unbounded_channel();
        let (writes, written) = mpsc::unbounded_channel();
        let (comes, down) = mpsc::unbounded_channel();
        let (reads, is_read) = watch::channel(true);
        let task = Served {
            id,
            world: world.clone(),
            replica: replica.clone(),
            is_read,
            dice: Dice::new(dice.within(0..u64::MAX), client),
        };
        let server = tokio::spawn(replica.machine.run(task.run(arrives, writes)));
        let abort = server.abort_handle();
        let at = (replica.place, replica.side);
        let call = world.roads.open(client, at, now, abort.clone());
        let delays = [0, 1].map(|_| Dice::new(dice.within(0..u64::MAX), client));
        let [to, from] = delays;
        let road = Road { world: world.clone(), client, place: replica.place };
        tokio::spawn(road.clone().up(id, sent, arriving, to));
        tokio::spawn(road.down(written, server, comes, from));
        let (world, replica) = (world.clone(), replica.clone());
        let up = Some(up);
        let stream = Self { id, world, replica, up, down, reads, server: abort, call };
        stream.send(first);
        Some(stream)
    }

    /// Sends a frame, unless the client has half-closed the stream.
    pub fn send(&self, frame: pb::ConsumeRequest) {
        // The replica may be gone.
        self.up.iter().for_each(|up| _ = up.send(frame.clone()));
    }

    pub fn half_close(&mut self) {
        self.up = None;
        self.world.watch().stream_closes(self.id);
    }

    /// The client reads frames from now on, or does not.
    pub fn read(&self, reads: bool) {
        self.reads.send_replace(reads);
        let now = self.world.net.now();
        self.world.watch().stream_reads(self.id, reads, now);
    }

    pub fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    /// The next frame, or the end. Nothing comes after the end.
    pub async fn next(&mut self) -> Down {
        self.down.recv().await.unwrap_or(Down::End(Ended::Lost))
    }
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        self.server.abort();
        self.world.roads.close(self.call);
    }
}

/// Waits until no partition is in the way; `false`: the connection was given up before.
async fn passes(world: &World, client: u64, place: usize) -> bool {
    let now = world.net.now();
    let Some(until) = world.roads.parted(client, place, now) else { return true };
    let given_up = now + KEEPALIVE;
    tokio::time::sleep_until(world.at(until.min(given_up))).await;
    until <= given_up
}

/// The way between the two.
#[derive(Clone)]
struct Road {
    world: Arc<World>,
    client: u64,
    place: usize,
}

impl Road {
    async fn up(
        self,
        id: FetchId,
        mut sent: mpsc::UnboundedReceiver<pb::ConsumeRequest>,
        arriving: mpsc::UnboundedSender<pb::ConsumeRequest>,
        mut dice: Dice,
    ) {
        while let Some(frame) = sent.recv().await {
            sleep(dice.millis(0..5)).await;
            if !passes(&self.world, self.client, self.place).await {
                return;
            }
            let now = self.world.net.now();
            self.world.watch().stream_heard(id, now);
            if arriving.send(frame).is_err() {
                return;
            }
        }
        // The end of the stream takes as long as a frame.
        sleep(dice.millis(0..5)).await;
    }

    async fn down(
        self,
        mut written: mpsc::UnboundedReceiver<(pb::ConsumeResponse, Time)>,
        server: JoinHandle<Result<(), Status>>,
        comes: mpsc::UnboundedSender<Down>,
        mut dice: Dice,
    ) {
        let mut passed = true;
        while let Some((frame, at)) = written.recv().await {
            sleep(dice.millis(0..5)).await;
            passed &= passes(&self.world, self.client, self.place).await;
            if passed {
                let _ = comes.send(Down::Frame(Box::new(frame), at));
            }
        }
        let ended = match server.await {
            Ok(Ok(())) if passed => Ended::Done,
            Ok(Err(status)) if passed => Ended::Failed(status),
            Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
            Ok(_) | Err(_) => Ended::Lost,
        };
        sleep(dice.millis(0..5)).await;
        let _ = comes.send(Down::End(ended));
    }
}

/// Tells the watch that a stream has ended at its replica, however it ends.
struct Ends(Arc<World>, FetchId);

impl Drop for Ends {
    fn drop(&mut self) {
        let now = self.0.net.now();
        self.0.watch().stream_ended(self.1, now);
    }
}

/// The call at its replica.
struct Served {
    id: FetchId,
    world: Arc<World>,
    replica: Arc<Replica>,
    is_read: watch::Receiver<bool>,
    dice: Dice,
}

impl Served {
    async fn run(
        mut self,
        arrives: mpsc::UnboundedReceiver<pb::ConsumeRequest>,
        writes: mpsc::UnboundedSender<(pb::ConsumeResponse, Time)>,
    ) -> Result<(), Status> {
        let ends = Ends(self.world.clone(), self.id);
        let served = self.serve(arrives, writes).await;
        drop(ends);
        if served.is_err() {
            let (side, most) = (self.replica.side, self.replica.most);
            let lessor = &self.replica.lessor;
            let room = Room { side, most, held: lessor.held(), free: lessor.room() as usize };
            self.watch(|watch, now| watch.fetch_refused(self.id, room, now));
        }
        served
    }

    async fn serve(
        &mut self,
        arrives: mpsc::UnboundedReceiver<pb::ConsumeRequest>,
        writes: mpsc::UnboundedSender<(pb::ConsumeResponse, Time)>,
    ) -> Result<(), Status> {
        let decoder = Codec::default().decoder();
        let requests = Streaming::new_request(decoder, Upward(arrives), None, None);
        let answer = self.replica.service.consume(Request::new(requests)).await?;
        let holds = answer.extensions().get::<FrameHolds>().cloned().unwrap_or_default();
        let mut frames = answer.into_inner();
        loop {
            // The client has dropped its side, and aborts this task.
            if self.is_read.wait_for(|reads| *reads).await.is_err() {
                std::future::pending::<()>().await;
            }
            let Some(frame) = frames.next().await else { return Ok(()) };
            let frame = frame?;
            let made = self.world.net.now();
            let hold = holds.lock().unwrap().pop_front();
            if self.dice.percent(5) {
                // The window of the client is full, so the frame waits.
                sleep(self.dice.millis(0..400)).await;
            }
            hold.iter().for_each(fetch_proxy::grpc::FrameHold::deliver);
            self.watch(|watch, now| watch.frame_written(self.id, &frame, (made, now)));
            // The client may just have hung up.
            let _ = writes.send((frame, made));
        }
    }

    fn watch(&self, tell: impl FnOnce(&mut Watch, Time)) {
        let now = self.world.net.now();
        tell(&mut self.world.watch(), now);
    }
}
