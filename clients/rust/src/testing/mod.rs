//! A proxy in the memory of a test, with one stream and one consumer. It speaks the contract on a free port of this
//! machine, so the real client and the real worker run with it.

mod queue;
mod service;
mod stream;

use std::{net::TcpListener, pin::pin, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use serde::Serialize;
use tokio::{runtime, sync::oneshot, time};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

pub use self::queue::{Record, Settled};
use self::{
    queue::Queue,
    service::{Service, Shared},
};
use crate::{
    Client, Code, Credentials, Error, Headers, Worker, error::code_of,
    pb::fetch_service_server::FetchServiceServer,
};

/// How long a run may take.
const LONGEST_RUN: Duration = Duration::from_secs(30);

/// The settings of the consumer.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// The number of attempts after which a message ends. 0, unless set: no limit.
    pub max_deliver: u32,
    /// The lease of a fetch without a length. 30 s unless set.
    pub ack_wait: Duration,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self { max_deliver: 0, ack_wait: Duration::from_secs(30) }
    }
}

/// A proxy in memory, whatever a worker calls its stream and its consumer. It ends when it is dropped.
pub struct FakeProxy {
    shared: Arc<Shared>,
    address: String,
    client: Client,
    end: Option<oneshot::Sender<()>>,
    server: Option<thread::JoinHandle<()>>,
}

impl FakeProxy {
    /// Begins to serve.
    ///
    /// # Panics
    /// This machine has no free port, or no thread.
    pub fn start(options: FakeOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        listener.set_nonblocking(true).expect("a socket may be non-blocking");
        let address = listener.local_addr().expect("a listener has an address").to_string();
        let client = Client::new(&address, Credentials::default()).expect("the address is valid");
        let shared = Arc::new(Shared::new(Queue::new(options.max_deliver, options.ack_wait)));
        let (end, ended) = oneshot::channel();
        let serving = serve(shared.clone(), listener, ended);
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("there may be another runtime");
        // With its runtime, all of its connections end.
        let server = thread::spawn(move || runtime.block_on(serving));
        Self { shared, address, client, end: Some(end), server: Some(server) }
    }

    /// `host:port`, for another client.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client of the fake.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Adds a message with a payload of JSON, on the subject `tasks`.
    ///
    /// # Panics
    /// The payload has no JSON.
    pub fn publish(&self, payload: impl Serialize) -> Record {
        let payload = serde_json::to_vec(&payload).expect("the payload is JSON");
        self.publish_bytes(payload, "tasks", Headers::new())
    }

    /// Adds a message with any payload.
    pub fn publish_bytes(
        &self,
        payload: impl Into<Bytes>,
        subject: &str,
        headers: Headers,
    ) -> Record {
        self.shared.change(|state| state.queue.publish(payload.into(), subject, headers))
    }

    /// All messages, in the order of the stream.
    pub fn messages(&self) -> Vec<Record> {
        self.shared.change(|state| state.queue.records.clone())
    }

    /// Ends the lease of a message, as if another worker had it. It is delivered again.
    pub fn expire(&self, record: &Record) {
        self.shared.change(|state| state.queue.expire(record));
    }

    /// The next call of this method fails: `fail("Fetch", "NATS_UNAVAILABLE")`.
    ///
    /// # Panics
    /// The reason is no reason of the proxy.
    pub fn fail(&self, method: &str, reason: &str) {
        assert!(code_of(reason).is_some(), "{reason} is no reason of the proxy");
        self.shared.change(|state| state.failures.push((method.to_owned(), reason.to_owned())));
    }

    /// The next Ack, Nak or Term fails, in whatever call it comes: `fail_settlement("LEASE_BUSY")`.
    ///
    /// # Panics
    /// The reason is no reason of the proxy.
    pub fn fail_settlement(&self, reason: &str) {
        self.fail(service::SETTLEMENT, reason);
    }

    /// The next call of this method is carried out, and its answer is lost.
    pub fn lose_answer(&self, method: &str) {
        self.shared.change(|state| state.losses.push(method.to_owned()));
    }

    /// Ends all streams, as if a connection broke.
    pub fn cut(&self) {
        self.shared.change(|state| state.cut());
    }

    /// The credentials that came with the calls of Fetch.
    pub fn bearers(&self) -> Vec<String> {
        self.shared.change(|state| state.bearers.clone())
    }

    /// Waits until every message has ended.
    pub async fn settled(&self) {
        self.shared.until(|state| state.queue.is_idle()).await;
    }

    /// Runs the worker until every message has ended, then stops it.
    ///
    /// # Errors
    /// The error of the worker. `DEADLINE_EXCEEDED`: messages have not ended after 30 s.
    pub async fn run(&self, worker: Worker) -> Result<(), Error> {
        let stop = worker.stop_handle();
        let mut running = pin!(worker.run());
        let ended = tokio::select! {
            result = &mut running => return result,
            ended = time::timeout(LONGEST_RUN, self.settled()) => ended,
        };
        if ended.is_err() {
            let left = self.messages().into_iter().filter(|record| !record.has_ended());
            let left: Vec<String> = left.map(|record| record.sequence().to_string()).collect();
            let told = format!("these messages have not ended: {}", left.join(", "));
            return Err(Error::new("DEADLINE_EXCEEDED", Code::DeadlineExceeded, told));
        }
        stop.stop();
        match time::timeout(LONGEST_RUN, &mut running).await {
            Ok(result) => result,
            // A handler that hangs must not hang the test.
            Err(_) => {
                stop.stop();
                running.await
            }
        }
    }
}

impl Drop for FakeProxy {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(server) = self.server.take() {
            drop(server.join());
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: TcpListener, ended: oneshot::Receiver<()>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("it is non-blocking");
    let service = FetchServiceServer::new(Service(shared.clone()));
    tokio::select! {
        _ = ended => {}
        () = shared.keep_time() => {}
        result = Server::builder().serve_with_incoming(service, TcpListenerStream::new(listener)) => {
            result.expect("the fake serves");
        }
    }
}
