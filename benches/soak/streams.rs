//! The stream of a worker that consumes: its frames, and the settlements that go by the stream.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fetch_proxy::pb::{
    self, ConsumeCredit, ConsumeRequest, ConsumeSettle, ConsumeStart, Settlement,
};
use testkit::proxy::Client;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::{Status, Streaming};

/// The frames of settlements that have no result yet.
#[derive(Debug, Default)]
struct Awaited {
    last_id: u64,
    results: HashMap<u64, oneshot::Sender<pb::ConsumeResult>>,
}

/// Both directions of a stream.
pub struct WorkerStream {
    pub desk: StreamDesk,
    frames: Streaming<pb::ConsumeResponse>,
}

/// Settles by a stream. It can be cloned, and outlive the stream.
#[derive(Debug, Clone)]
pub struct StreamDesk {
    send: mpsc::WeakUnboundedSender<ConsumeRequest>,
    /// `None`: the stream is over.
    awaited: Arc<Mutex<Option<Awaited>>>,
}

impl WorkerStream {
    pub async fn open(
        mut client: Client,
        start: ConsumeStart,
    ) -> Result<(Self, mpsc::UnboundedSender<ConsumeRequest>), Status> {
        let (send, mut receive) = mpsc::unbounded_channel();
        let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
        let _ = send.send(ConsumeRequest { start: Some(start), ..Default::default() });
        let frames = client.consume(requests).await?.into_inner();
        let awaited = Arc::new(Mutex::new(Some(Awaited::default())));
        Ok((Self { desk: StreamDesk { send: send.downgrade(), awaited }, frames }, send))
    }

    /// The next frame. `None`: the stream has ended with OK.
    pub async fn next(&mut self) -> Result<Option<pb::ConsumeResponse>, Status> {
        let Some(mut frame) = self.frames.message().await? else { return Ok(None) };
        for result in frame.results.drain(..) {
            self.desk.done(result);
        }
        Ok(Some(frame))
    }
}

impl Drop for WorkerStream {
    fn drop(&mut self) {
        *lock(&self.desk.awaited) = None;
    }
}

pub fn credit(max_leases: u32) -> ConsumeCredit {
    ConsumeCredit { max_leases: Some(max_leases), ..Default::default() }
}

impl StreamDesk {
    /// Sends the settlements, and waits for their results. `None`: the stream is over, and nothing was sent.
    pub async fn settle(
        &self,
        settlements: Vec<Settlement>,
        confirmation: i32,
        within: Duration,
    ) -> Option<Result<Vec<pb::SettleResult>, Status>> {
        let send = self.send.upgrade()?;
        let (done, result) = oneshot::channel();
        let id = lock(&self.awaited).as_mut()?.expect(done);
        let settle = Some(ConsumeSettle { id, settlements, confirmation });
        let sent = send.send(ConsumeRequest { settle, ..Default::default() });
        drop(send);
        let result = timeout(within, result).await;
        let (Ok(()), Ok(Ok(result))) = (sent, result) else {
            return Some(Err(Status::unknown("no result")));
        };
        assert_eq!(result.error, None, "a frame was refused");
        Some(Ok(result.results))
    }

    fn done(&self, result: pb::ConsumeResult) {
        let mut awaited = lock(&self.awaited);
        if let Some(done) = awaited.as_mut().and_then(|awaited| awaited.results.remove(&result.id))
        {
            let _ = done.send(result);
        }
    }
}

impl Awaited {
    fn expect(&mut self, done: oneshot::Sender<pb::ConsumeResult>) -> u64 {
        self.last_id += 1;
        self.results.insert(self.last_id, done);
        self.last_id
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
