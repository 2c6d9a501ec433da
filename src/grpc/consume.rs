//! One Consume: a task between the frames of the client, the flow of messages, and the frames of the answer.
//!
//! ```text
//!  frames of the client ──▶ start, credit ──▶ Flow ──▶ messages ─┐
//!                      └──▶ settle ──▶ under way ──▶ results ────┴─▶ one frame when the body asks ──▶ Outlet
//! ```
//! 1. Of each ConsumeSettle comes one result, unless the stream ends first.
//! 2. A frame is made when the body asks for one. Until then its messages are leased to nobody.
//! 3. Frames are read without waiting for the reader of the answer, until [`MAX_UNDER_WAY`] ConsumeSettle have no
//!    written result.
//! 4. A settlement that has begun ends, also if the client leaves.

mod frames;
mod idle;
mod messages;
mod numbers;
mod outlet;
mod pending_results;
mod settling;
mod silence;
mod start;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tonic::{Code, Status, Streaming};

pub(super) use self::outlet::ConsumeFrames;
use self::{
    idle::IdleReason, numbers::Numbers, outlet::Outlet, pending_results::PendingResults,
    settling::SettledFrame, silence::Silence, start::StartedConsume,
};
pub(super) use self::{outlet::outlet, start::ConsumeCall};

use super::{backend::Backend, to_status::to_status};
use crate::{
    api_error::{ApiError, SilentDirection},
    broker::Broker,
    bus::Bus,
    clock::{self, Alarm},
    lessor::{Error, Flow, FlowEnd, FlowIdle},
    net::ClientConnection,
    pb,
    reason::Reason,
    request_log::CallWork,
};

/// Most ConsumeSettle frames without a written result. Beyond that no frame is read, and HTTP/2 stops the client.
const MAX_UNDER_WAY: usize = 16;
/// Longest wait for the first frame.
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages that wait this long for a client that does not read go to others.
const MAX_UNREAD: Duration = Duration::from_secs(1);
/// The time from the age of a connection to the end of its streams.
const AGE_GRACE: Duration = Duration::from_secs(30);
/// Longest wait for the answer to the question why nothing comes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);
/// The end of a stream that is announced.
struct Leaving {
    cause: pb::ConsumeDrainCause,
    /// `None`: the replica ends it.
    by: Option<Instant>,
    told: bool,
}

/// See the [module](self).
pub(super) struct ConsumeTask<B: Broker + Bus> {
    service: Backend<B>,
    started: StartedConsume,
    connection: Option<Arc<ClientConnection>>,
    requests: Option<Streaming<pb::ConsumeRequest>>,
    outlet: Outlet,
    flow: Flow<B>,
    /// The flow was closed by this side.
    closed: bool,
    /// What the flow held at the last look.
    holds: u64,
    /// The client does not read, and the stream fails for that.
    unread: bool,
    numbers: Numbers,
    silence: Silence,
    idle: IdleReason,
    under_way: FuturesUnordered<BoxFuture<'static, SettledFrame>>,
    results: PendingResults,
    /// The messages that the consumer still had after the last delivery.
    pending: u64,
    credit_id: u64,
    opened: Option<pb::ConsumeOpened>,
    leaving: Option<Leaving>,
    /// Why the stream fails, once all results are written.
    failure: Option<ApiError>,
    written_at: Instant,
    stalled_until: Option<Instant>,
    /// For the times of the stream, of which many come before they are reached.
    alarm: Alarm,
    work: CallWork,
}

/// Reads the first frame, and runs the task of the stream until the stream has ended.
pub(super) async fn run<B: Broker + Bus>(
    service: Backend<B>,
    mut requests: Streaming<pb::ConsumeRequest>,
    call: ConsumeCall,
    connection: Option<Arc<ClientConnection>>,
    outlet: Outlet,
) {
    let lessor = service.lessor.clone();
    let first = tokio::select! {
        biased;
        () = lessor.closes() => return outlet.end(Err(closed())),
        first = tokio::time::timeout(FIRST_FRAME_TIMEOUT, requests.message()) => first,
    };
    let first = match first {
        Ok(Ok(Some(first))) => first,
        Ok(Ok(None)) => return outlet.end(Err(to_status(&start::missing("there is no frame")))),
        Ok(Err(status)) => return outlet.end(Err(foreign(&status))),
        Err(_) => return outlet.end(Err(to_status(&start::missing("must come within 5 s")))),
    };
    let begun = start::begin(&service, call, first);
    let (started, flow, opened, settle) = match begun {
        Ok(begun) => begun,
        Err(refused) => return outlet.end(Err(to_status(&refused))),
    };
    let credit_id = started.credit_id;
    let work = CallWork {
        stream: Some(started.stream.clone()),
        consumer: Some(started.consumer.clone()),
        worker: Some(started.worker.clone()).filter(|worker| !worker.is_empty()),
        messages: Some(0),
        rejected: Some(0),
        tokens: Some(0),
        failed: Some(0),
        ..CallWork::default()
    };
    let (now, heartbeat) = (clock::now(), started.heartbeat);
    let mut task = ConsumeTask {
        silence: Silence::new(heartbeat, started.keeps, now),
        idle: IdleReason::new(heartbeat, now),
        service,
        started,
        connection,
        requests: Some(requests),
        outlet,
        flow,
        closed: false,
        holds: 0,
        unread: false,
        numbers: Numbers::default(),
        under_way: FuturesUnordered::new(),
        results: PendingResults::default(),
        pending: 0,
        credit_id,
        opened: Some(opened),
        leaving: None,
        failure: None,
        written_at: now,
        stalled_until: None,
        alarm: Alarm::default(),
        work,
    };
    settle.into_iter().for_each(|settle| task.settle(settle));
    tokio::select! {
        biased;
        () = lessor.closes() => task.outlet.end(Err(closed())),
        () = task.serve() => {}
    }
}

impl<B: Broker + Bus> ConsumeTask<B> {
    async fn serve(&mut self) {
        loop {
            if self.outlet.is_closed() {
                return;
            }
            let now = clock::now();
            self.look(now);
            if self.outlet.is_wanted()
                && !self.results_wait(now)
                && let Some(frame) = self.frame(now).await
            {
                self.written_at = clock::now();
                self.outlet.put(frame);
                continue;
            }
            if let Some(end) = self.end(now) {
                // The record is read as soon as the answer has ended.
                let Self { started, work, .. } = self;
                started.call.record.iter().for_each(|record| record.did(|| work.clone()));
                return self.outlet.end(end);
            }
            self.next_event().await;
        }
    }

    /// Waits for something to happen, and takes it in.
    async fn next_event(&mut self) {
        let until = self.next_deadline(clock::now());
        let reads = self.reads();
        let lessor = self.service.lessor.clone();
        let (drains, ages) = (self.leaving.is_none(), self.leaving.is_none());
        let Self { requests, connection, under_way, outlet, flow, idle, alarm, .. } = self;
        let message = async {
            match requests {
                Some(requests) if reads => requests.message().await,
                Some(_) | None => std::future::pending().await,
            }
        };
        let going = async {
            match connection {
                Some(connection) => connection.is_going().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = lessor.drains(), if drains => self.leave(pb::ConsumeDrainCause::Replica, None),
            () = going, if ages => {
                let by = clock::now() + AGE_GRACE;
                self.leave(pb::ConsumeDrainCause::ConnectionAge, Some(by));
            }
            Some(settled) = under_way.next() => self.settled(settled),
            message = message => self.received(message),
            () = idle.answered() => {}
            () = outlet.changed() => {}
            () = flow.changed() => {}
            () = alarm.sleep_until(until) => {}
        }
    }

    /// The time of the next thing that the task does by itself. What it owes a client that does not read waits for
    /// the client.
    fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let heartbeat = self.written_at + self.started.heartbeat;
        let heartbeat = Some(heartbeat).filter(|_| self.outlet.is_wanted());
        let results = self.results.waits_until().filter(|_| self.outlet.is_wanted());
        let stalled = self.stalled_until.filter(|until| now < *until);
        let unread = self.flow.waits_since().map(|since| since + MAX_UNREAD);
        let by = match &self.leaving {
            Some(leaving) => leaving.by,
            None => self.started.notice_at,
        };
        let silent = self.silence.next_deadline();
        let idle = self.idle.next_deadline().filter(|at| now < *at || self.outlet.is_wanted());
        let idle = idle.filter(|_| self.tells_idle());
        [heartbeat, results, unread, by, stalled, silent, idle].into_iter().flatten().min()
    }

    /// Whether there is nothing to write but results, and messages are about to come. What is due takes the results with
    /// it.
    fn results_wait(&mut self, now: Instant) -> bool {
        let due = now >= self.written_at + self.started.heartbeat || self.idle.is_due(now);
        let alone = self.credit_id == 0 && self.opened.is_none() && self.leaving.is_none();
        let alone = alone && !due && !self.numbers.has_untold();
        let room = (self.flow.leased() as u64) < self.flow.credit().messages;
        let to_come = self.pending > 0 && room && self.flow.waits_since().is_none();
        self.results.wait(alone && to_come && !self.closed, now)
    }

    /// Takes in what has happened since the last look.
    fn look(&mut self, now: Instant) {
        if self.leaving.is_none() && self.started.notice_at.is_some_and(|at| now >= at) {
            self.leave(pb::ConsumeDrainCause::Deadline, self.started.ends_at);
        }
        match self.flow.end() {
            Some(FlowEnd::Over) => self.flow.free_place(),
            Some(FlowEnd::Failed(error)) => {
                if matches!(error, Error::ConsumerNotFound(_) | Error::StreamNotFound(_)) {
                    self.numbers.gone();
                }
                if !self.closed {
                    self.fail(error.into());
                }
            }
            None => {}
        }
        // In this order: the end of the last lease is taken in with it.
        self.holds = self.flow.holds();
        self.numbers.ended(self.flow.take_ended());
        self.listen(now);
        if self.tells_idle() && self.idle.asks(now) {
            self.ask_why_idle(now);
        }
        if self.stalled_until.is_some_and(|until| now >= until && self.outlet.is_wanted()) {
            self.stalled_until = None;
            self.flow.stall(false);
        } else if self.flow.waits_since().is_some_and(|since| now >= since + MAX_UNREAD) {
            self.stall(now);
        }
    }

    /// Whether frames of the client are read now.
    fn reads(&self) -> bool {
        self.under_way.len() + self.results.len() < MAX_UNDER_WAY
    }

    /// Looks whether the client is silent.
    fn listen(&mut self, now: Instant) {
        self.silence.reads(self.reads(), now);
        self.silence.wrote(self.outlet.is_wanted(), self.outlet.written(), now);
        if self.silence.was_missed(now) {
            self.silence.forgive(now);
        }
        let Some(silent) = self.silence.is_over(now) else { return };
        self.unread = matches!(silent, ApiError::StreamSilent(SilentDirection::Reading, _));
        // A frame may be here that was not looked at.
        let requests = self.requests.as_mut().filter(|_| !self.unread);
        if let Some(message) = requests.and_then(|requests| requests.message().now_or_never()) {
            return self.received(message);
        }
        self.fail(silent);
    }

    /// Whether messages are to come.
    fn tells_idle(&self) -> bool {
        !self.closed && self.leaving.is_none()
    }

    fn ask_why_idle(&mut self, now: Instant) {
        let service = &self.service;
        let rights = service.gatekeeper().rights();
        let limited = service.leases_left(&rights, &self.started.principal).is_err();
        let why = self.flow.idle(now + IDLE_TIMEOUT);
        self.idle.ask(async move {
            match why.await {
                Some(FlowIdle::Empty(..)) if limited => Some(FlowIdle::LeaseLimit),
                why => why,
            }
        });
    }

    /// Messages that wait go to others. The flow gets none until the client reads again.
    fn stall(&mut self, until: Instant) {
        self.flow.stall(true);
        self.stalled_until = Some(until);
    }

    fn leave(&mut self, cause: pb::ConsumeDrainCause, by: Option<Instant>) {
        if cause != pb::ConsumeDrainCause::Replica {
            self.close();
        }
        self.leaving = Some(Leaving { cause, by, told: false });
    }

    fn close(&mut self) {
        self.closed = true;
        self.flow.close();
    }

    /// The client is not heard any more.
    fn stop_reading(&mut self) {
        self.requests = None;
        self.silence.half_closed();
        self.close();
        self.flow.end_kept();
    }

    fn fail(&mut self, error: ApiError) {
        self.stop_reading();
        self.failure.get_or_insert(error);
    }

    /// A frame of the client has come, or its end.
    fn received(&mut self, message: Result<Option<pb::ConsumeRequest>, Status>) {
        match message {
            Ok(Some(frame)) => {
                self.silence.heard(clock::now());
                if frame.start.is_some() {
                    return self.fail(start::wrong("start", "must be in the first frame alone"));
                }
                if let Some(credit) = frame.credit {
                    match start::credit("credit", Some(&credit), self.flow.credit()) {
                        Ok(new) => {
                            self.flow.set_credit(new);
                            self.credit_id = credit.id;
                        }
                        Err(refused) => return self.fail(refused),
                    }
                }
                frame.settle.into_iter().for_each(|settle| self.settle(settle));
            }
            Ok(None) => self.stop_reading(),
            // A client that has left reads nothing.
            Err(status) => {
                self.fail(ApiError::Foreign(foreign_reason(&status), status.message().to_owned()))
            }
        }
    }

    fn settle(&mut self, settle: pb::ConsumeSettle) {
        if let Some(settling) = self.begin(settle) {
            self.under_way.push(settling.boxed());
        }
    }

    /// How the stream ends now. `None`: it does not.
    fn end(&self, now: Instant) -> Option<Result<(), Status>> {
        if self.leaving.as_ref().is_some_and(|leaving| leaving.by.is_some_and(|by| now >= by)) {
            return Some(Ok(()));
        }
        // A client that does not read gets no results.
        let told = self.results.is_empty() && !self.numbers.has_untold() && self.opened.is_none();
        let quiet = self.unread || self.under_way.is_empty() && told;
        if let Some(error) = self.failure.as_ref().filter(|_| quiet) {
            return Some(Err(to_status(error)));
        }
        let told = self.leaving.as_ref().is_some_and(|leaving| leaving.told);
        let over = self.closed || self.flow.end() == Some(FlowEnd::Over);
        let left = told && over && self.holds == 0;
        (quiet && (self.requests.is_none() || left)).then_some(Ok(()))
    }
}

/// The status of a stream that this replica cannot serve any longer.
fn closed() -> Status {
    to_status(&Error::Draining.into())
}

/// The status for an error of the library that reads the frames.
fn foreign(status: &Status) -> Status {
    to_status(&ApiError::Foreign(foreign_reason(status), status.message().to_owned()))
}

fn foreign_reason(status: &Status) -> Reason {
    let too_large = [Code::OutOfRange, Code::ResourceExhausted].contains(&status.code());
    if too_large { Reason::RequestTooLarge } else { Reason::Malformed }
}
