//! The fake's side of the contract: calls and streams around the queue. Decides nothing about a message.

use std::{
    collections::BTreeMap,
    future::pending,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc::unbounded_channel, watch},
    time::{self, Instant},
};
use tokio_stream::{Stream, StreamExt as _, wrappers::UnboundedReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    queue::{Queue, Taken, failure},
    stream::FakeStream,
};
use crate::{
    error::{code_of, duration_of},
    pb::{
        AckRequest, AckResponse, ConsumeRequest, ConsumeResponse, ConsumeResult, EmptyReason,
        ExtendRequest, ExtendResponse, FetchRequest, FetchResponse, GetConsumerRequest,
        GetConsumerResponse, GiveBackRequest, GiveBackResponse, NakRequest, NakResponse,
        SettleRequest, SettleResponse, SettleResult, Settlement, TermRequest, TermResponse,
        fetch_service_server::FetchService, settlement::Action,
    },
};

/// The name of a settlement in the failures.
pub(super) const SETTLEMENT: &str = "settlement";
/// The defaults of the contract.
const MAX_BYTES: u32 = (4 << 20) - 1024;
const HEARTBEAT: Duration = Duration::from_secs(10);
const MAX_WAIT: Duration = Duration::from_secs(30);

pub(super) struct State {
    pub queue: Queue,
    /// Methods whose next call fails, with the reason.
    pub failures: Vec<(String, String)>,
    /// Methods whose next answer is lost.
    pub losses: Vec<String>,
    /// The credentials of all calls of Fetch.
    pub bearers: Vec<String>,
    /// The tokens of each attempt. `None`: it is over.
    attempts: BTreeMap<String, Option<Vec<String>>>,
    streams: BTreeMap<u64, FakeStream>,
    last_stream: u64,
}

impl State {
    pub fn cut(&mut self) {
        self.streams.values().for_each(FakeStream::break_off);
    }

    /// Messages go to those who wait for messages.
    fn look(&mut self) {
        let now = Instant::now();
        let over = self.queue.lapse(now);
        for stream in self.streams.values_mut() {
            stream.look(&self.queue, &over);
            stream.deliver(&mut self.queue, now);
        }
    }

    fn failure_of(&mut self, method: &str) -> Option<String> {
        let place = self.failures.iter().position(|(name, _)| name == method)?;
        Some(self.failures.remove(place).1)
    }

    fn settle(&mut self, token: &str, action: Option<Action>) -> SettleResult {
        let is_extension = matches!(action, Some(Action::Extend(_)));
        match if is_extension { None } else { self.failure_of(SETTLEMENT) } {
            Some(reason) => failure(&reason, "the test says so"),
            None => self.queue.settle(token, action, Instant::now()),
        }
    }

    /// `None`: no message is here.
    fn fetch(&mut self, request: &FetchRequest) -> Option<FetchResponse> {
        let (codec, now) = (request.codec(), Instant::now());
        let known = self.attempts.get(&request.attempt_id).cloned();
        let mut answer = FetchResponse::default();
        let tokens = if let Some(tokens) = known {
            let mut tokens = tokens.unwrap_or_default();
            tokens.retain(|token| self.queue.is_open(token));
            answer.set_empty_reason(EmptyReason::AttemptOver);
            tokens
        } else {
            let mut tokens = Vec::new();
            while tokens.len() + answer.rejected.len() < request.n.max(1) as usize {
                match self.queue.take(now, request.lease.map(duration_of), codec) {
                    Some(Taken::Leased(token)) => tokens.push(token),
                    Some(Taken::Rejected(rejected)) => answer.rejected.push(*rejected),
                    None => break,
                }
            }
            if tokens.is_empty() && answer.rejected.is_empty() {
                return None;
            }
            answer.set_empty_reason(EmptyReason::Rejected);
            tokens
        };
        let most = if request.max_bytes == 0 { MAX_BYTES } else { request.max_bytes };
        for token in &tokens {
            match self.queue.delivery(token, codec, most) {
                Ok(message) => answer.messages.push(message),
                Err(rejected) => answer.rejected.push(*rejected),
            }
        }
        if !answer.messages.is_empty() {
            answer.set_empty_reason(EmptyReason::Unspecified);
        }
        if !request.attempt_id.is_empty() {
            self.attempts.insert(request.attempt_id.clone(), Some(tokens));
        }
        Some(answer)
    }

    fn give_back(&mut self, attempt: String) -> u32 {
        let tokens = self.attempts.insert(attempt, None).flatten().unwrap_or_default();
        let open: Vec<_> = tokens.iter().filter(|token| self.queue.is_open(token)).collect();
        open.iter().for_each(|token| self.queue.release(token));
        open.len() as u32
    }

    fn hear(&mut self, id: u64, frame: ConsumeRequest) {
        if let (Some(credit), Some(stream)) = (frame.credit, self.streams.get_mut(&id)) {
            stream.credit = credit.max_leases.map_or(stream.credit, |credit| credit as usize);
            stream.say(ConsumeResponse { credit_id: credit.id, ..ConsumeResponse::default() });
        }
        let Some(settle) = frame.settle else { return };
        let mut results = Vec::new();
        for Settlement { token, action, number } in settle.settlements {
            let numbered = self.streams.get(&id).and_then(|stream| stream.token(number));
            results.push(match (number, numbered) {
                (0, _) => self.settle(&token, action),
                (_, Some(token)) => self.settle(&token, action),
                (_, None) => failure("LEASE_EXPIRED", "the lease has ended"),
            });
        }
        let result = ConsumeResult { id: settle.id, results, ..ConsumeResult::default() };
        if let Some(stream) = self.streams.get(&id) {
            stream.say(ConsumeResponse { results: vec![result], ..ConsumeResponse::default() });
        }
    }
}

/// The state, and a version of it that grows with each change.
pub(super) struct Shared {
    state: Mutex<State>,
    version: watch::Sender<u64>,
}

impl Shared {
    pub fn new(queue: Queue) -> Self {
        let state = State {
            queue,
            failures: Vec::new(),
            losses: Vec::new(),
            bearers: Vec::new(),
            attempts: BTreeMap::new(),
            streams: BTreeMap::new(),
            last_stream: 0,
        };
        Self { state: Mutex::new(state), version: watch::Sender::new(0) }
    }

    pub fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        state.look();
        drop(state);
        self.version.send_modify(|version| *version += 1);
        result
    }

    pub async fn until(&self, is_so: impl Fn(&State) -> bool) {
        let mut version = self.version.subscribe();
        let now = |_: &u64| is_so(&self.state.lock().unwrap_or_else(PoisonError::into_inner));
        // This struct has the sender, so the channel does not close.
        let _ = version.wait_for(now).await;
    }

    /// Ends leases in time.
    pub async fn keep_time(&self) {
        let mut version = self.version.subscribe();
        loop {
            let next = self.state.lock().unwrap_or_else(PoisonError::into_inner).queue.next_lapse();
            let lapse = async {
                match next {
                    Some(next) => time::sleep_until(next).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = lapse => self.change(|_| {}),
                _ = version.changed() => {}
            }
        }
    }

    /// One call of a method, which may be told to fail.
    fn called<A>(
        &self,
        method: &str,
        call: impl FnOnce(&mut State) -> Result<A, Status>,
    ) -> Result<Response<A>, Status> {
        self.change(|state| {
            state.began(method)?;
            let answer = call(state)?;
            state.answered(method).map(|()| Response::new(answer))
        })
    }

    fn settled(
        &self,
        method: &str,
        token: &str,
        action: Action,
    ) -> Result<Response<SettleResult>, Status> {
        self.called(method, |state| {
            let result = state.settle(token, Some(action));
            if result.error.is_some() { Err(refusal(&result)) } else { Ok(result) }
        })
    }
}

impl State {
    fn began(&mut self, method: &str) -> Result<(), Status> {
        let Some(reason) = self.failure_of(method) else { return Ok(()) };
        Err(refusal(&failure(&reason, "the test says so")))
    }

    fn answered(&mut self, method: &str) -> Result<(), Status> {
        let Some(place) = self.losses.iter().position(|name| name == method) else { return Ok(()) };
        self.losses.remove(place);
        Err(Status::unavailable("the test has lost the answer"))
    }
}

/// The methods, for a server.
pub(super) struct Service(pub Arc<Shared>);

#[tonic::async_trait]
impl FetchService for Service {
    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<FetchResponse>, Status> {
        let bearer =
            request.metadata().get("authorization").and_then(|bearer| bearer.to_str().ok());
        let bearer = bearer.map(str::to_owned);
        self.0.change(|state| state.bearers.extend(bearer));
        let request = request.into_inner();
        let wait = request.max_wait.map_or(MAX_WAIT, duration_of);
        let until = Instant::now() + wait;
        let mut version = self.0.version.subscribe();
        self.0.change(|state| state.began("Fetch"))?;
        loop {
            version.mark_unchanged();
            if let Some(answer) = self.0.change(|state| state.fetch(&request)) {
                self.0.change(|state| state.answered("Fetch"))?;
                return Ok(Response::new(answer));
            }
            version.mark_unchanged();
            if time::timeout_at(until, version.changed()).await.is_err() {
                let mut answer = FetchResponse::default();
                answer.set_empty_reason(EmptyReason::NoMessages);
                return Ok(Response::new(answer));
            }
        }
    }

    async fn ack(&self, request: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        let AckRequest { token, .. } = request.into_inner();
        let result = self.0.settled("Ack", &token, Action::Ack(Default::default()))?;
        Ok(result.map(|SettleResult { outcome, .. }| AckResponse { outcome }))
    }

    async fn nak(&self, request: Request<NakRequest>) -> Result<Response<NakResponse>, Status> {
        let NakRequest { token, delay, .. } = request.into_inner();
        let result = self.0.settled("Nak", &token, Action::Nak(crate::pb::NakAction { delay }))?;
        Ok(result.map(|SettleResult { outcome, .. }| NakResponse { outcome, redeliver_time: None }))
    }

    async fn term(&self, request: Request<TermRequest>) -> Result<Response<TermResponse>, Status> {
        let TermRequest { token, reason, .. } = request.into_inner();
        let result =
            self.0.settled("Term", &token, Action::Term(crate::pb::TermAction { reason }))?;
        Ok(result.map(|SettleResult { outcome, .. }| TermResponse { outcome }))
    }

    async fn extend(
        &self,
        request: Request<ExtendRequest>,
    ) -> Result<Response<ExtendResponse>, Status> {
        let ExtendRequest { token, lease } = request.into_inner();
        let action = Action::Extend(crate::pb::ExtendAction { lease });
        let result = self.0.settled("Extend", &token, action)?;
        Ok(result.map(|result| ExtendResponse { lease: result.lease, lease_expire_time: None }))
    }

    async fn settle(
        &self,
        request: Request<SettleRequest>,
    ) -> Result<Response<SettleResponse>, Status> {
        let parts = request.into_inner().settlements;
        self.0.called("Settle", |state| {
            let results = parts.into_iter().map(|part| state.settle(&part.token, part.action));
            let results: Vec<_> = results.collect();
            let failed = results.iter().filter(|result| result.error.is_some()).count() as u32;
            Ok(SettleResponse { results, failed })
        })
    }

    async fn give_back(
        &self,
        request: Request<GiveBackRequest>,
    ) -> Result<Response<GiveBackResponse>, Status> {
        let attempt = request.into_inner().attempt_id;
        self.0
            .called("GiveBack", |state| Ok(GiveBackResponse { messages: state.give_back(attempt) }))
    }

    async fn get_consumer(
        &self,
        _: Request<GetConsumerRequest>,
    ) -> Result<Response<GetConsumerResponse>, Status> {
        Err(refusal(&failure("UNSUPPORTED", "the fake has no GetConsumer")))
    }

    type ConsumeStream = Pin<Box<dyn Stream<Item = Result<ConsumeResponse, Status>> + Send>>;

    async fn consume(
        &self,
        request: Request<Streaming<ConsumeRequest>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        self.0.change(|state| state.began("Consume"))?;
        let shared = self.0.clone();
        let mut frames = request.into_inner();
        let (tell, told) = unbounded_channel();
        // The first frame may come after the headers of the answer.
        tokio::spawn(async move {
            let Ok(Some(ConsumeRequest { start: Some(start), .. })) = frames.message().await else {
                return drop(tell.send(Err(refusal(&failure("INVALID_FIELD", "no start")))));
            };
            let beat = start.heartbeat.map_or(HEARTBEAT, duration_of);
            let stream = FakeStream::new(tell.clone(), start);
            let id = shared.change(|state| {
                state.last_stream += 1;
                state.streams.insert(state.last_stream, stream);
                state.last_stream
            });
            let mut beats = time::interval(beat);
            loop {
                tokio::select! {
                    frame = frames.message() => match frame {
                        Ok(Some(frame)) => shared.change(|state| state.hear(id, frame)),
                        _ => break,
                    },
                    _ = beats.tick() => drop(tell.send(Ok(ConsumeResponse::default()))),
                    () = tell.closed() => break,
                }
            }
            shared.change(|state| {
                if let Some(stream) = state.streams.remove(&id) {
                    stream.leave(&mut state.queue, Instant::now());
                }
            });
        });
        // An error ends the stream.
        let mut is_over = false;
        let frames = UnboundedReceiverStream::new(told)
            .take_while(move |frame| !std::mem::replace(&mut is_over, frame.is_err()));
        Ok(Response::new(Box::pin(frames)))
    }
}

/// A status as the proxy makes it.
fn refusal(result: &SettleResult) -> Status {
    let error = result.error.clone().unwrap_or_default();
    let code = code_of(&error.reason).unwrap_or(Code::Unknown);
    let mut status = Status::new(code, error.message);
    let mut set = |name, value: String| {
        if let Ok(value) = value.parse() {
            status.metadata_mut().insert(name, value);
        }
    };
    set("fetchproxy-reason", error.reason);
    if let Some(wait) = error.retry_delay {
        set("grpc-retry-pushback-ms", duration_of(wait).as_millis().to_string());
    }
    status
}
