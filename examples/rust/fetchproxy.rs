//! What a worker needs around the generated client: the channel, what a refusal means, when to ask
//! again, and a batch whose leases are kept alive and settled. Copy it.

use std::{
    collections::VecDeque,
    future::Future,
    pin::pin,
    time::{Duration, Instant},
};

use pb::{
    AckAction, Delivery, ExtendAction, FetchRequest, FetchResponse, NakAction, SettleRequest,
    Settlement, TermAction, fetch_service_client::FetchServiceClient, settlement::Action,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Error},
};
use tonic_types::StatusExt as _;

/// The contract, generated.
#[allow(clippy::all, reason = "generated")]
pub mod pb {
    tonic::include_proto!("fetchproxy.v1");
}

pub type Client = FetchServiceClient<Channel>;

/// The most that an answer may have. The library's own limit is 4 MiB: raise both together.
pub const MAX_BYTES: u32 = 16 << 20;
/// Longer than the proxy takes to answer a settlement: 5 s, unless it is told otherwise.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest delay of a Nak; a longer one would fail the whole call.
const LONGEST_DELAY: Duration = Duration::from_secs(24 * 3600);
/// The longest wait before a call is repeated.
const PATIENCE: Duration = Duration::from_secs(5);
/// No outcome waits longer for others to be settled with.
const GATHERING: Duration = Duration::from_millis(100);

/// Why work failed.
pub enum Failure {
    /// It may work later: the message comes back after this time.
    Transient(Duration),
    /// It will never work: the message never comes back.
    Poison(String),
}

/// A client of `host:port`, or of several with commas between, in turn.
pub fn connect(addresses: &str) -> Result<Client, Error> {
    let endpoints = addresses.split(',').map(|address| {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        let endpoint = endpoint.connect_timeout(Duration::from_secs(5));
        Ok(endpoint.http2_keep_alive_interval(Duration::from_secs(30)).keep_alive_while_idle(true))
    });
    let mut endpoints = endpoints.collect::<Result<Vec<_>, Error>>()?;
    let channel = match endpoints.len() {
        1 => endpoints.remove(0).connect_lazy(),
        _ => Channel::balance_list(endpoints.into_iter()),
    };
    Ok(Client::new(channel).max_decoding_message_size(MAX_BYTES as usize + (1 << 20)))
}

/// Why a call or a settlement was refused, and after how long it may be repeated.
pub struct Refusal {
    pub reason: String,
    after: Option<Duration>,
}

impl Refusal {
    pub fn of(status: &Status) -> Self {
        let info = status.get_details_error_info().filter(|info| info.domain == "fetchproxy");
        let retry = status.get_details_retry_info();
        Self {
            reason: info.map_or_else(|| format!("{:?}", status.code()), |info| info.reason),
            after: retry.and_then(|retry| retry.retry_delay),
        }
    }

    /// Whether the message is somebody else's by now, or settled, or will come again.
    fn is_final(&self) -> bool {
        let reasons = [
            "LEASE_EXPIRED",
            "LEASE_SETTLED",
            "TOKEN_INVALID",
            "JETSTREAM_DENIED",
            "INVALID_FIELD",
            "NATS_PERMISSION",
        ];
        reasons.contains(&&*self.reason)
    }
}

/// Of a Fetch: repeating it helps nobody, somebody must look.
fn is_hopeless(code: Code) -> bool {
    use Code::{
        FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated,
        Unimplemented,
    };
    let codes = [InvalidArgument, NotFound, FailedPrecondition, PermissionDenied];
    codes.contains(&code) || [Unauthenticated, Unimplemented].contains(&code)
}

/// Waits before a call is repeated: as long as was asked for, and longer each time.
#[derive(Default)]
struct Backoff {
    tries: u32,
}

impl Backoff {
    fn next(&mut self, refusal: &Refusal) -> Duration {
        let longest = Duration::from_millis(100 << self.tries.min(6)).min(PATIENCE);
        self.tries += 1;
        let asked = refusal.after.unwrap_or_default().min(PATIENCE);
        let wait = asked + longest.mul_f64(fastrand::f64() / 2.0 + 0.5);
        crate::say(&serde_json::json!({
            "event": "retry", "reason": refusal.reason, "in": wait.as_secs_f64(),
        }));
        wait
    }
}

/// An answer, however often it must be asked for; `None` when told to stop first.
pub async fn fetch(
    client: &mut Client,
    wanted: &FetchRequest,
    stop: &CancellationToken,
) -> Result<Option<FetchResponse>, Status> {
    let mut backoff = Backoff::default();
    loop {
        let mut request = Request::new(wanted.clone());
        request.set_timeout(of(wanted.max_wait) + Duration::from_secs(5));
        match stop.run_until_cancelled(client.fetch(request)).await {
            None => return Ok(None),
            Some(Ok(answer)) => return Ok(Some(answer.into_inner())),
            Some(Err(status)) if is_hopeless(status.code()) => return Err(status),
            Some(Err(status)) => {
                let wait = backoff.next(&Refusal::of(&status));
                stop.run_until_cancelled(sleep(wait)).await;
            }
        }
    }
}

/// A message in hand.
struct Lease {
    token: String,
    length: Duration,
    ends: Instant,
    decided: bool,
}

/// What is to become of a message, and what is said when it has.
struct Outcome {
    lease: usize,
    since: Instant,
    action: Action,
    line: serde_json::Value,
}

/// Messages in hand, and outcomes that are not settled yet.
pub struct Batch {
    client: Client,
    leases: Vec<Lease>,
    outcomes: VecDeque<Outcome>,
}

impl Batch {
    pub fn new(client: &Client, messages: &[Delivery]) -> Self {
        let now = Instant::now();
        let lease = |message: &Delivery| {
            let (token, length) = (message.token.clone(), of(message.lease));
            Lease { token, length, ends: now + length, decided: false }
        };
        let leases = messages.iter().map(lease).collect();
        Self { client: client.clone(), leases, outcomes: VecDeque::new() }
    }

    pub fn is_over(&self, place: usize) -> bool {
        self.leases[place].ends <= Instant::now()
    }

    /// Works, and extends every lease that nothing is decided about meanwhile.
    pub async fn alive_during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = self.beat() => {}
            }
        }
    }

    /// At a third of what is left of the shortest.
    async fn beat(&mut self) {
        let now = Instant::now();
        let held = |lease: &&mut Lease| !lease.decided && lease.ends > now;
        let mut held: Vec<_> = self.leases.iter_mut().filter(held).collect();
        let left = held.iter().map(|lease| lease.ends - now).min().unwrap_or(PATIENCE);
        sleep((left / 3).max(Duration::from_millis(50))).await;
        let began = Instant::now();
        let settlements = held.iter().map(|lease| {
            let length = lease.length.max(Duration::from_secs(1));
            let action = Action::Extend(ExtendAction { lease: Some(to(length)) });
            Settlement { token: lease.token.clone(), action: Some(action) }
        });
        let Ok(results) = settle(&mut self.client, settlements.collect()).await else {
            return; // The next beat tries again, and comes sooner.
        };
        for (lease, result) in held.iter_mut().zip(results) {
            match result {
                Ok(length) => lease.ends = began + length,
                Err(refusal) if refusal.is_final() => lease.ends = began,
                Err(_) => {}
            }
        }
    }

    pub fn ack(&mut self, place: usize, line: serde_json::Value) {
        self.decide(place, Action::Ack(AckAction {}), line);
    }

    pub fn nak(&mut self, place: usize, delay: Duration, line: serde_json::Value) {
        let delay = Some(to(delay.min(LONGEST_DELAY)));
        self.decide(place, Action::Nak(NakAction { delay }), line);
    }

    pub fn term(&mut self, place: usize, reason: String, line: serde_json::Value) {
        self.decide(place, Action::Term(TermAction { reason }), line);
    }

    fn decide(&mut self, place: usize, action: Action, line: serde_json::Value) {
        self.leases[place].decided = true;
        self.outcomes.push_back(Outcome { lease: place, since: Instant::now(), action, line });
    }

    /// Whether an outcome has waited for others long enough.
    pub fn is_due(&self) -> bool {
        self.outcomes.front().is_some_and(|first| first.since.elapsed() >= GATHERING)
    }

    /// Settles what was decided. Repeats with the same tokens, which harms nobody, while the leases
    /// last.
    pub async fn settle(&mut self) {
        let mut backoff = Backoff::default();
        loop {
            let Some(refusal) = self.try_to_settle().await else { return };
            let (over, open): (VecDeque<_>, _) = self
                .outcomes
                .drain(..)
                .partition(|open| self.leases[open.lease].ends <= Instant::now());
            over.into_iter().for_each(Outcome::lost);
            self.outcomes = open;
            if !self.outcomes.is_empty() {
                sleep(backoff.next(&refusal)).await;
            }
        }
    }

    /// Leaves what must be repeated, and says why.
    async fn try_to_settle(&mut self) -> Option<Refusal> {
        let settlements = self.outcomes.iter().map(|outcome| {
            let token = self.leases[outcome.lease].token.clone();
            Settlement { token, action: Some(outcome.action.clone()) }
        });
        let settlements: Vec<_> = settlements.collect();
        if settlements.is_empty() {
            return None;
        }
        let results = match settle(&mut self.client, settlements).await {
            Ok(results) => results,
            Err(refusal) if refusal.is_final() => {
                self.outcomes.drain(..).for_each(Outcome::lost);
                return None;
            }
            Err(refusal) => return Some(refusal),
        };
        let mut why = None;
        for (outcome, result) in std::mem::take(&mut self.outcomes).into_iter().zip(results) {
            match result {
                // Also where it was settled so before: OUTCOME_DUPLICATE.
                Ok(_) => crate::say(&outcome.line),
                Err(refusal) if refusal.is_final() => outcome.lost(),
                Err(refusal) => {
                    self.outcomes.push_back(outcome);
                    why = Some(refusal);
                }
            }
        }
        why
    }
}

impl Outcome {
    fn lost(mut self) {
        self.line["event"] = "lost".into();
        crate::say(&self.line);
    }
}

/// For each settlement what is left of its lease, where it was extended, or why it was refused.
async fn settle(
    client: &mut Client,
    settlements: Vec<Settlement>,
) -> Result<Vec<Result<Duration, Refusal>>, Refusal> {
    let mut request = Request::new(SettleRequest { settlements, ..SettleRequest::default() });
    request.set_timeout(SETTLE_TIMEOUT);
    let answer = client.settle(request).await.map_err(|status| Refusal::of(&status))?;
    let results = answer.into_inner().results.into_iter().map(|result| match result.error {
        None => Ok(of(result.lease)),
        Some(error) => {
            let after = error.retry_delay.map(|delay| of(Some(delay)));
            Err(Refusal { reason: error.reason, after })
        }
    });
    Ok(results.collect())
}

fn of(length: Option<prost_types::Duration>) -> Duration {
    length.and_then(|length| length.try_into().ok()).unwrap_or_default()
}

pub fn to(length: Duration) -> prost_types::Duration {
    length.try_into().expect("a length that fits")
}
