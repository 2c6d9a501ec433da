//! The part of a worker around the generated client: the channel, repeats, and a batch whose keeper
//! extends the leases and settles the messages. Copy it without changes. It must know nothing of
//! the work.

use std::{
    env, error, fs, iter,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use pb::{
    AckAction, Delivery, ExtendAction, FetchRequest, FetchResponse, GiveBackRequest, NakAction,
    Rejected, RejectedCause, SettleError, SettleRequest, SettleResponse, SettleResult, Settlement,
    TermAction, delivery::Payload, fetch_service_client::FetchServiceClient, settlement::Action,
};
use serde_json::{Value, json};
use tokio::{sync::Notify, task::JoinHandle, time};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Response, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Error, Identity},
};
use tonic_types::StatusExt as _;

/// The generated contract.
#[allow(clippy::all, reason = "generated")]
pub mod pb {
    tonic::include_proto!("fetchproxy.v1");
}

/// The largest answer, in bytes. The library's own limit is 4 MiB: raise both together.
pub const MAX_BYTES: u32 = 16 << 20;
/// The longest wait before a call is repeated. A Fetch has this time in addition to its own wait.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest wait of an outcome for others, to be settled in the same call. If no other is left,
/// the outcome does not wait.
const GATHERING: Duration = Duration::from_millis(100);

/// Why work failed.
pub enum Failure {
    /// The work may succeed later: the message comes back after this time.
    Transient(Duration),
    /// The work will never succeed: the message does not come back.
    Poison(String),
    /// An unexpected error: the message comes back in 5 s, and the error is logged.
    Unexpected(Box<dyn error::Error + Send + Sync>),
}

impl<E: error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Unexpected(error.into())
    }
}

/// The proxy, and the credentials of the worker. Their files are read for each call: the next call
/// has the new token, and a new certificate makes a new channel.
#[derive(Clone)]
pub struct Client {
    address: String,
    files: [Option<String>; 3],
    channel: Channel,
}

impl Client {
    /// For `host:port`, `https://host:port` with TLS, or `dns:///name:port`. Connects at a call, and
    /// again after a break.
    ///
    /// # Errors
    /// A file cannot be used, or others could read the token on its way.
    pub fn new(address: &str) -> Result<Self, Status> {
        let address = address.trim_start_matches("dns:///").to_owned();
        let is_protected = ["https://", "localhost:", "127.0.0.1:", "[::1]:"]
            .iter()
            .any(|begin| address.starts_with(begin));
        if content("BEARER_FILE")?.is_some() && !is_protected {
            let why = format!("a credential is not sent to {address} without TLS: use https://");
            return Err(Status::unauthenticated(why));
        }
        let files = files()?;
        let channel = connect(&address, &files).map_err(|error| unusable(&error))?;
        Ok(Self { address, files, channel })
    }

    /// The generated client, and the request with the token.
    pub fn ready<Q>(
        &mut self,
        mut request: Request<Q>,
    ) -> Result<(FetchServiceClient<Channel>, Request<Q>), Status> {
        let files = files()?;
        if files != self.files {
            self.channel = connect(&self.address, &files).map_err(|error| unusable(&error))?;
            self.files = files;
        }
        if let Some(token) = content("BEARER_FILE")? {
            let value = format!("Bearer {}", token.trim()).parse();
            let value = value.map_err(|error| unusable(&error))?;
            request.metadata_mut().insert("authorization", value);
        }
        let client = FetchServiceClient::new(self.channel.clone());
        Ok((client.max_decoding_message_size(MAX_BYTES as usize + (1 << 20)), request))
    }
}

fn connect(address: &str, [ca, cert, key]: &[Option<String>; 3]) -> Result<Channel, Error> {
    let has_tls = address.starts_with("https://");
    let url = if has_tls { address.to_owned() } else { format!("http://{address}") };
    let mut endpoint = Endpoint::from_shared(url)?.connect_timeout(PATIENCE);
    endpoint = endpoint.http2_keep_alive_interval(Duration::from_secs(30));
    endpoint = endpoint.keep_alive_while_idle(true);
    if has_tls {
        let mut tls = match ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let (Some(cert), Some(key)) = (cert, key) {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        endpoint = endpoint.tls_config(tls)?;
    }
    Ok(endpoint.connect_lazy())
}

fn files() -> Result<[Option<String>; 3], Status> {
    Ok([content("CA")?, content("CERT")?, content("KEY")?])
}

/// The content of the file that this variable names, if it is set.
fn content(name: &str) -> Result<Option<String>, Status> {
    let Ok(file) = env::var(format!("FETCH_PROXY_{name}")) else { return Ok(None) };
    let read = fs::read_to_string(&file);
    read.map(Some).map_err(|error| Status::unavailable(format!("{file}: {error}")))
}

/// A file that is wrong now may be right soon.
fn unusable(error: &dyn error::Error) -> Status {
    Status::unavailable(chain(error))
}

/// The text of an error and of its causes.
fn chain(error: &dyn error::Error) -> String {
    let causes = iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The next answer with messages. `None` if the worker must stop first. The repeats of a call have
/// one name, so they get the messages of an answer that was lost.
///
/// # Errors
/// An error that a person must look at.
pub async fn fetch(
    client: &mut Client,
    wanted: &FetchRequest,
    stop: &CancellationToken,
) -> Result<Option<FetchResponse>, String> {
    let (timeout, mut tries) = (of(wanted.max_wait) + PATIENCE, 0);
    let mut request = FetchRequest { attempt_id: new_name(), ..wanted.clone() };
    loop {
        let began = Instant::now();
        let call = within(timeout, client, request.clone(), async |mut client, request| {
            client.fetch(request).await
        });
        let wait = match stop.run_until_cancelled(call).await.transpose() {
            Ok(Some(answer)) if answer.messages.is_empty() && answer.rejected.is_empty() => {
                tries = 0;
                request = FetchRequest { attempt_id: new_name(), ..wanted.clone() };
                // A draining proxy, for example, answers at once.
                Duration::from_millis(500).saturating_sub(began.elapsed())
            }
            Ok(Some(answer)) => return Ok(Some(answer)),
            Ok(None) => {
                give_back(client, request).await;
                return Ok(None);
            }
            Err(error) if passes(&error) => {
                request.attempt_again = true;
                wait(&error, &mut tries)
            }
            Err(error) => return Err(format!("{}: {}", error.reason, error.message)),
        };
        stop.run_until_cancelled(time::sleep(wait)).await;
    }
}

fn new_name() -> String {
    format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}

/// Returns the messages of a Fetch whose answer nobody reads. If it fails, they come back when their
/// leases end.
async fn give_back(client: &mut Client, request: FetchRequest) {
    let FetchRequest { stream, consumer, attempt_id, .. } = request;
    let message = GiveBackRequest { stream, consumer, attempt_id };
    let call = within(Duration::from_secs(1), client, message, async |mut client, request| {
        client.give_back(request).await
    });
    if let Err(error) = call.await {
        eprintln!("the last Fetch is not given back: {}: {}", error.reason, error.message);
    }
}

/// An answer within the time. The request's own timeout would not include the time to connect.
async fn within<Q, A>(
    timeout: Duration,
    client: &mut Client,
    message: Q,
    call: impl AsyncFnOnce(FetchServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
) -> Result<A, SettleError> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    let answer = match client.ready(request) {
        Err(status) => Err(status),
        Ok((client, request)) => tokio::select! {
            biased;
            () = time::sleep(timeout) => Err(Status::deadline_exceeded("no answer in time")),
            answer = call(client, request) => answer,
        },
    };
    answer.map(Response::into_inner).map_err(|status| refusal(&status))
}

/// Why a call failed, as the error of each of its parts.
pub fn refusal(status: &Status) -> SettleError {
    use Code::*;
    let info = status.get_details_error_info().filter(|info| info.domain == "fetchproxy");
    let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
    SettleError {
        reason: info.map_or_else(|| format!("{:?}", status.code()), |info| info.reason),
        // The causes of a failed connection are not in its message.
        message: error::Error::source(status).map_or_else(|| status.message().to_owned(), chain),
        retry_delay: match status.code() {
            InvalidArgument | NotFound | FailedPrecondition => None,
            PermissionDenied | Unauthenticated | Unimplemented => None,
            _ => Some(to(retry.unwrap_or_default())),
        },
        ..SettleError::default()
    }
}

/// Whether the call may be repeated with the same token.
pub fn passes(refusal: &SettleError) -> bool {
    refusal.retry_delay.is_some() || refusal.reason == "SETTLE_UNCONFIRMED"
}

/// How long to wait before the next try: at least the time that was asked for, and longer each
/// time.
pub fn wait(refusal: &SettleError, tries: &mut u32) -> Duration {
    let longest = Duration::from_millis(100 << (*tries).min(6)).min(PATIENCE);
    *tries += 1;
    let asked = of(refusal.retry_delay).min(PATIENCE);
    let wait = asked + longest.mul_f64(0.5 + fastrand::f64() / 2.0);
    let (SettleError { reason, message, .. }, seconds) = (refusal, wait.as_secs_f64());
    say(&json!({ "event": "retry", "reason": reason, "message": message, "in": seconds }));
    wait
}

/// The messages of one Fetch, shared by the worker and a keeper.
pub struct Batch {
    leases: Mutex<Vec<Lease>>,
    decided: Notify,
    stop: CancellationToken,
}

impl Batch {
    /// Logs the rejected messages and starts a keeper. The keeper ends when all messages are
    /// settled or lost. If the worker must stop, the keeper gives back all messages that are not
    /// begun.
    pub fn keep(
        client: &Client,
        answer: &FetchResponse,
        stop: &CancellationToken,
    ) -> (Arc<Self>, JoinHandle<()>) {
        let mut leases: Vec<_> = answer.messages.iter().map(Lease::of).collect();
        for rejected in &answer.rejected {
            let lease = Lease::of_rejected(rejected);
            leases.extend((!rejected.token.is_empty()).then_some(lease));
        }
        let (leases, stop) = (Mutex::new(leases), stop.clone());
        let batch = Arc::new(Self { leases, decided: Notify::new(), stop });
        (batch.clone(), tokio::spawn(batch.settle_and_extend(client.clone())))
    }

    /// Works on a message if it is still ours. The result of the work decides the outcome. The
    /// token that the work receives is cancelled if the lease is lost.
    pub async fn work<W>(&self, place: usize, work: impl FnOnce(CancellationToken) -> W)
    where
        W: Future<Output = Result<Value, Failure>> + Send + 'static,
    {
        let Some(lost) = self.begin(place) else { return };
        // In a task of its own, so that a panic ends only the task.
        let done = tokio::spawn(work(lost)).await.unwrap_or_else(|panic| Err(panic.into()));
        self.leases()[place].decide_by(done);
        self.decided.notify_one();
    }

    fn begin(&self, place: usize) -> Option<CancellationToken> {
        let lease = &mut self.leases()[place];
        lease.stays |= !self.stop.is_cancelled();
        (lease.is_there(Instant::now()) && lease.stays).then(|| lease.gone.clone())
    }

    fn leases(&self) -> MutexGuard<'_, Vec<Lease>> {
        self.leases.lock().expect("nobody panics who holds it")
    }

    /// The keeper. Each turn makes one call, with all outcomes and extensions that are due.
    async fn settle_and_extend(self: Arc<Self>, mut client: Client) {
        let (mut quiet_until, mut tries) = (Instant::now(), 0);
        loop {
            let (now, is_stopped) = (Instant::now(), self.stop.is_cancelled());
            let Some(wake) = self.next_turn(now, is_stopped, quiet_until) else { return };
            if wake > now {
                tokio::select! {
                    () = time::sleep_until(wake.into()) => {}
                    () = self.decided.notified() => {}
                    () = self.stop.cancelled(), if !is_stopped => {}
                }
                continue;
            }
            let (places, settlements, timeout) = self.next_call(now);
            let message = SettleRequest { settlements, ..SettleRequest::default() };
            let call = within(timeout, &mut client, message, async |mut client, request| {
                client.settle(request).await
            });
            quiet_until = self.note(now, places, call.await, &mut tries);
        }
    }

    /// The time of the next call. `None` if no lease is left.
    fn next_turn(&self, now: Instant, is_stopped: bool, quiet_until: Instant) -> Option<Instant> {
        let mut leases = self.leases();
        let there = leases.iter_mut().filter_map(|lease| lease.is_there(now).then_some(lease));
        let mut there: Vec<_> = there.collect();
        for lease in there.iter_mut().filter(|lease| lease.outcome.is_none()) {
            if is_stopped && !lease.stays {
                lease.decide("returned", nak(Duration::ZERO), Value::Null);
            }
        }
        let is_open = there.iter().any(|lease| lease.outcome.is_none());
        let turns = there.iter().map(|lease| {
            let gathers = is_open && lease.outcome.is_some();
            let turn = lease.due + if gathers { GATHERING } else { Duration::ZERO };
            turn.max(quiet_until).min(lease.ends)
        });
        turns.min()
    }

    /// The settlements that are due, and how long to wait for the answer.
    fn next_call(&self, now: Instant) -> (Vec<usize>, Vec<Settlement>, Duration) {
        let (mut leases, mut timeout) = (self.leases(), Duration::from_secs(10));
        let there = leases.iter_mut().enumerate().filter(|(_, lease)| !lease.gone.is_cancelled());
        // The proxy accepts no more in a call.
        let due = there.filter(|(_, lease)| lease.due <= now).take(1000);
        let parts = due.map(|(place, lease)| {
            timeout = timeout.min((lease.ends - now) / 2);
            (place, lease.next_part())
        });
        let (places, settlements) = parts.unzip();
        (places, settlements, timeout.max(Duration::from_secs(1)))
    }

    /// Records the results of a call. Returns the time before which another call is of no use.
    fn note(
        &self,
        began: Instant,
        places: Vec<usize>,
        answer: Result<SettleResponse, SettleError>,
        tries: &mut u32,
    ) -> Instant {
        let has_failed = answer.is_err();
        let failed = |error| SettleResult { error: Some(error), ..SettleResult::default() };
        let all_failed = |error| vec![failed(error); places.len()];
        let results = answer.map_or_else(all_failed, |answer| answer.results);
        let again = results.iter().filter_map(|result| result.error.as_ref()).filter(|e| passes(e));
        let wait = again.max_by_key(|e| of(e.retry_delay)).map(|worst| wait(worst, tries));
        *tries = wait.map_or(0, |_| *tries);
        let due = Instant::now() + wait.unwrap_or_default();
        for (place, result) in places.into_iter().zip(results) {
            let lease = &mut self.leases()[place];
            match result.error {
                _ if lease.gone.is_cancelled() => {}
                None if lease.is_settling => lease.end(),
                None => lease.lasts(began, of(result.lease)),
                Some(error) if passes(&error) => lease.due = due,
                Some(error) => lease.lose(&format!("{}: {}", error.reason, error.message)),
            }
        }
        if has_failed { due } else { began }
    }
}

/// A message in hand, until it is settled or its lease is lost.
pub struct Lease {
    pub token: String,
    /// The log line at the end. A rejected message was logged already and gets no second line.
    line: Value,
    is_rejected: bool,
    ends: Instant,
    /// When to settle or extend it.
    due: Instant,
    /// Begun, or on its last attempt. A Nak of the last attempt would end the message.
    stays: bool,
    pub outcome: Option<Action>,
    /// Whether the call under way settles the message. Otherwise the call extends the lease.
    is_settling: bool,
    pub gone: CancellationToken,
}

impl Lease {
    pub fn of(message: &Delivery) -> Self {
        let (last, now) = (message.max_deliver, Instant::now());
        let mut lease = Self {
            token: message.token.clone(),
            line: json!({
                "event": "lost",
                "sequence": message.stream_sequence,
                "deliveries": message.delivery_count,
                "id": id(message),
            }),
            is_rejected: false,
            ends: now,
            due: now,
            stays: last > 0 && message.delivery_count >= last,
            outcome: None,
            is_settling: false,
            gone: CancellationToken::new(),
        };
        lease.lasts(now, of(message.lease));
        lease
    }

    /// Logs a rejected message. With a token, it is also leased.
    pub fn of_rejected(rejected: &Rejected) -> Self {
        let message = Delivery {
            token: rejected.token.clone(),
            stream_sequence: rejected.stream_sequence,
            delivery_count: rejected.delivery_count,
            lease: rejected.lease,
            ..Delivery::default()
        };
        let mut lease = Self { is_rejected: true, ..Self::of(&message) };
        let outcome = match rejected.cause() {
            // Another worker may accept larger answers.
            RejectedCause::TooLarge => nak(Duration::from_secs(60)),
            _ => term(&rejected.detail),
        };
        lease.decide("rejected", outcome, Value::Null);
        eprintln!("message {} is rejected: {}", rejected.stream_sequence, rejected.detail);
        say(&lease.line);
        lease
    }

    /// A lease that is over by our clock counts as lost.
    fn is_there(&mut self, now: Instant) -> bool {
        if !self.gone.is_cancelled() && self.ends <= now {
            self.lose("its time is over");
        }
        !self.gone.is_cancelled()
    }

    /// The next extension is due after a third of the lease.
    fn lasts(&mut self, from: Instant, length: Duration) {
        self.ends = from + length;
        if self.outcome.is_none() {
            self.due = from + (length / 3).max(Duration::from_millis(50));
        }
    }

    /// The result of the work decides the outcome.
    pub fn decide_by(&mut self, done: Result<Value, Failure>) {
        match done {
            Ok(told) => self.decide("acked", Action::Ack(AckAction {}), told),
            Err(Failure::Transient(delay)) => self.decide("nacked", nak(delay), Value::Null),
            Err(Failure::Poison(reason)) => self.decide("termed", term(&reason), Value::Null),
            Err(Failure::Unexpected(error)) => {
                eprintln!("message {}: {error}", self.line["sequence"]);
                self.decide("nacked", nak(Duration::from_secs(5)), Value::Null);
            }
        }
    }

    fn decide(&mut self, event: &str, outcome: Action, told: Value) {
        (self.outcome, self.due) = (Some(outcome), Instant::now());
        self.line["event"] = event.into();
        for (name, value) in told.as_object().into_iter().flatten() {
            self.line[name] = value.clone();
        }
    }

    fn next_part(&mut self) -> Settlement {
        self.is_settling = self.outcome.is_some();
        // Without a length, the lease lasts as long as it was granted.
        let extend = || Action::Extend(ExtendAction { lease: None });
        let action = Some(self.outcome.clone().unwrap_or_else(extend));
        Settlement { token: self.token.clone(), action, ..Settlement::default() }
    }

    pub fn lose(&mut self, why: &str) {
        eprintln!("message {} is lost: {why}", self.line["sequence"]);
        self.line["event"] = "lost".into();
        self.end();
    }

    pub fn end(&mut self) {
        if !self.is_rejected {
            say(&self.line);
        }
        self.gone.cancel();
    }
}

fn nak(delay: Duration) -> Action {
    Action::Nak(NakAction { delay: Some(to(delay)) })
}

fn term(reason: &str) -> Action {
    Action::Term(TermAction { reason: reason[..reason.floor_char_boundary(1024)].to_owned() })
}

/// Prints one JSON object per line to standard output.
pub fn say(line: &Value) {
    println!("{line}");
}

/// The `id` of the payload, if the payload is a JSON object with an `id`.
fn id(message: &Delivery) -> Value {
    let Some(Payload::Text(text)) = &message.payload else { return Value::Null };
    serde_json::from_str::<Value>(text).unwrap_or_default()["id"].clone()
}

pub fn of(length: Option<prost_types::Duration>) -> Duration {
    length.and_then(|length| length.try_into().ok()).unwrap_or_default()
}

/// At most a day, because the proxy accepts no longer delay.
pub fn to(length: Duration) -> prost_types::Duration {
    length.min(Duration::from_secs(24 * 3600)).try_into().expect("a day fits")
}
