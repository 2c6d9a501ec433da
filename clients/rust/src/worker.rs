//! The worker: its options, its handler, and its end. The loops do the rest.

use std::{fmt, future::Future, io, ops::RangeInclusive, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::{
    Client, Envelope, Error, Event, Failure, Message, Source, Stop, Tracer,
    connection::MAX_BYTES,
    consume::{self, consume},
    event::{Hook, log_event},
    fetching::{self, fetch_batches},
    job::{Job, Work},
    message::{json, text, undecodable},
    pb::Codec,
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
/// The longest `grace`, and the longest `max_wait`.
const LONGEST_GRACE: Duration = Duration::from_secs(180);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// The proxy lowers a longer lease to its own longest. A year keeps sums of times in range.
const LONGEST_LEASE: Duration = Duration::from_secs(365 * 24 * 3600);

/// How messages come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Mode {
    /// One stream brings messages as handlers are free.
    #[default]
    Consume,
    /// A call for each batch.
    Fetch,
}

/// Runs a handler for each message of a consumer, many at once. If the handler returns `Ok`, its message is acked. Its
/// error may be a [`Nak`](crate::Nak) or a [`Term`](crate::Term). After any other error, the message comes back later.
///
/// The future of a handler is dropped when the lease of its message is lost.
#[must_use = "a worker does nothing before `run`"]
pub struct Worker {
    client: Client,
    source: Source,
    work: Work,
    codec: Codec,
    mode: Mode,
    concurrency: usize,
    batch: Option<usize>,
    max_wait: Duration,
    lease: Option<Duration>,
    grace: Duration,
    max_bytes: u32,
    at_most: Duration,
    stop_timeout: Option<Duration>,
    hook: Hook,
    name: String,
    tracer: Option<Arc<dyn Tracer>>,
    stop: Stop,
}

impl Worker {
    /// A worker on JSON. A message that is not a `T` is terminated. A message without payload is `null`: take
    /// `Message<Option<T>>` if the stream has such messages.
    pub fn new<T, H, F>(client: Client, stream: &str, consumer: &str, handler: H) -> Self
    where
        T: DeserializeOwned + Send + 'static,
        H: Fn(Message<T>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        Self::of(client, stream, consumer, Codec::Json, json, handler)
    }

    /// A worker on UTF-8 text.
    pub fn text<H, F>(client: Client, stream: &str, consumer: &str, handler: H) -> Self
    where
        H: Fn(Message<String>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        Self::of(client, stream, consumer, Codec::Text, text, handler)
    }

    /// A worker on bytes.
    pub fn bytes<H, F>(client: Client, stream: &str, consumer: &str, handler: H) -> Self
    where
        H: Fn(Message<Bytes>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let decode = |envelope: &Envelope| Ok::<_, io::Error>(envelope.payload.clone());
        Self::of(client, stream, consumer, Codec::Raw, decode, handler)
    }

    /// A worker whose payloads a function decodes. The error of `decode` is the reason of a Term.
    pub fn decoded<T, D, X, H, F>(
        client: Client,
        stream: &str,
        consumer: &str,
        decode: D,
        handler: H,
    ) -> Self
    where
        T: Send + 'static,
        D: Fn(&Envelope) -> Result<T, X> + Send + Sync + 'static,
        X: fmt::Display,
        H: Fn(Message<T>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        Self::of(client, stream, consumer, Codec::Raw, decode, handler)
    }

    fn of<T, D, X, H, F>(
        client: Client,
        stream: &str,
        consumer: &str,
        codec: Codec,
        decode: D,
        handler: H,
    ) -> Self
    where
        T: Send + 'static,
        D: Fn(&Envelope) -> Result<T, X> + Send + Sync + 'static,
        X: fmt::Display,
        H: Fn(Message<T>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let work = move |envelope: Arc<Envelope>| {
            let data = decode(&envelope).map_err(undecodable)?;
            Ok(Box::pin(handler(Message::new(data, envelope))) as _)
        };
        Self {
            client,
            source: Source { stream: stream.to_owned(), consumer: consumer.to_owned() },
            work: Arc::new(work),
            codec,
            mode: Mode::default(),
            concurrency: 16,
            batch: None,
            max_wait: 10 * SECOND,
            lease: None,
            grace: 10 * SECOND,
            max_bytes: MAX_BYTES,
            at_most: HOUR,
            stop_timeout: None,
            hook: Hook::new(log_event),
            name: "fetchproxy-rust".to_owned(),
            tracer: None,
            stop: Stop::new(),
        }
    }

    /// The most handlers at once: 1 to 1000. 16 unless set.
    pub fn concurrency(self, concurrency: usize) -> Self {
        Self { concurrency, ..self }
    }

    /// How messages come. [`Mode::Consume`] unless set.
    pub fn mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// With [`Mode::Fetch`]: the most messages that wait or are handled, 1 to 1000. As `concurrency` unless set.
    pub fn batch(self, batch: usize) -> Self {
        Self { batch: Some(batch), ..self }
    }

    /// With [`Mode::Fetch`]: the longest wait of a call for messages, at most 5 min. 10 s unless set.
    pub fn max_wait(self, max_wait: Duration) -> Self {
        Self { max_wait, ..self }
    }

    /// With [`Mode::Fetch`]: the length of a lease, 1 s or more, which is extended again and again. The ack wait of the
    /// consumer unless set.
    pub fn lease(self, lease: Duration) -> Self {
        Self { lease: Some(lease), ..self }
    }

    /// With [`Mode::Consume`]: messages of a worker that dies come back after this time. 1 s to 3 min; 10 s unless set.
    pub fn grace(self, grace: Duration) -> Self {
        Self { grace, ..self }
    }

    /// The bytes of messages in hand at which the worker takes no more, 1 KiB to 64 MiB. 16 MiB unless set. An answer or
    /// a frame has at most 16 MiB, and the last may pass this limit.
    pub fn max_bytes(self, max_bytes: u32) -> Self {
        Self { max_bytes, ..self }
    }

    /// The longest time that a lease is kept for one handler: 1 s or more. 1 h unless set.
    pub fn at_most(self, at_most: Duration) -> Self {
        Self { at_most, ..self }
    }

    /// How long handlers may continue after a stop. Until they end, unless set.
    pub fn stop_timeout(self, timeout: Duration) -> Self {
        Self { stop_timeout: Some(timeout), ..self }
    }

    /// Gets each event, in order. It must return soon. Warnings go to `tracing` unless set: see [`log_event`].
    pub fn on_event(self, on_event: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self { hook: Hook::new(on_event), ..self }
    }

    /// The name of the worker in the logs of the proxy, at most 1 KiB.
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Makes a span around each handler.
    pub fn tracer(self, tracer: impl Tracer + 'static) -> Self {
        Self { tracer: Some(Arc::new(tracer)), ..self }
    }

    /// Stops this worker.
    pub fn stop_handle(&self) -> Stop {
        self.stop.clone()
    }

    /// Works until it is stopped. Then waits for the handlers that run, and for their settlements. If this future is
    /// dropped, so are the handlers.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, before any call: an option is not in its range. Otherwise a refusal that a person must look
    /// at: the consumer does not exist, for example.
    pub async fn run(self) -> Result<(), Error> {
        self.check()?;
        let concurrency = match self.mode {
            Mode::Fetch => self.concurrency.min(self.batch.unwrap_or(self.concurrency)),
            Mode::Consume => self.concurrency,
        };
        let job = Job {
            source: self.source,
            work: self.work,
            codec: self.codec,
            tracer: self.tracer,
            hook: self.hook.clone(),
            concurrency,
            at_most: self.at_most,
        };
        let (name, max_bytes, stop_timeout) = (self.name, self.max_bytes, self.stop_timeout);
        let max_frame_bytes = max_bytes.min(MAX_BYTES);
        self.hook.tell(Event::Ready);
        match self.mode {
            Mode::Consume => {
                let grace = self.grace;
                let options =
                    consume::Options { name, grace, max_bytes, max_frame_bytes, stop_timeout };
                consume(self.client.connection, job, options, self.stop).await?;
            }
            Mode::Fetch => {
                let batch = self.batch.unwrap_or(self.concurrency);
                let (max_wait, lease) = (self.max_wait, self.lease);
                let options = fetching::Options {
                    name,
                    batch,
                    max_wait,
                    lease,
                    max_bytes,
                    max_frame_bytes,
                    stop_timeout,
                };
                fetch_batches(self.client.connection, job, options, self.stop).await?;
            }
        }
        self.hook.tell(Event::Stopped);
        Ok(())
    }

    /// The same as [`Worker::run`]. SIGTERM and SIGINT stop the worker. A second signal cancels the handlers.
    ///
    /// # Errors
    /// The same as of [`Worker::run`]. `UNAVAILABLE`: signals cannot be received.
    pub async fn run_until_signal(self) -> Result<(), Error> {
        let unusable = |error: io::Error| Error::unusable("signals", &error);
        let mut signals = Signals::new().map_err(unusable)?;
        let stop = self.stop_handle();
        let mut running = pin!(self.run());
        loop {
            tokio::select! {
                result = &mut running => return result,
                () = signals.next() => stop.stop(),
            }
        }
    }

    fn check(&self) -> Result<(), Error> {
        within("concurrency", &self.concurrency, 1..=1000)?;
        within("batch", &self.batch.unwrap_or(self.concurrency), 1..=1000)?;
        within("max_wait", &self.max_wait, Duration::ZERO..=LONGEST_WAIT)?;
        within("lease", &self.lease.unwrap_or(SECOND), SECOND..=LONGEST_LEASE)?;
        within("grace", &self.grace, SECOND..=LONGEST_GRACE)?;
        within("max_bytes", &self.max_bytes, 1024..=64 << 20)?;
        within("at_most", &self.at_most, SECOND..=LONGEST_LEASE)?;
        within("the length of name", &self.name.len(), 0..=1024)?;
        if self.source.stream.is_empty() || self.source.consumer.is_empty() {
            return Err(Error::invalid("stream and consumer must have names"));
        }
        Ok(())
    }
}

fn within<T: PartialOrd + fmt::Debug>(
    name: &str,
    value: &T,
    range: RangeInclusive<T>,
) -> Result<(), Error> {
    if range.contains(value) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    Err(Error::invalid(format!("{name} must be from {least:?} to {most:?}, not {value:?}")))
}

#[cfg(unix)]
struct Signals(tokio::signal::unix::Signal, tokio::signal::unix::Signal);

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self(signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
    }

    async fn next(&mut self) {
        tokio::select! { _ = self.0.recv() => {}, _ = self.1.recv() => {} }
    }
}

/// Other systems have Ctrl-C alone.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        drop(tokio::signal::ctrl_c().await);
    }
}
