//! `fetch-proxy work`: runs a command for each message of a consumer, or posts it to a URL, over Consume. It uses the
//! contract alone, like any other worker.
//!
//! `desk` decides about streams, leases and settlements, and `verdict` about the end of the work. Both are pure. `run`
//! performs their steps. `place` works on one message, `command` by a process and `http` by a
//! request. `printer` writes what `words` says.

mod captured;
mod command;
pub mod desk;
mod environment;
mod http;
mod job;
mod place;
mod printer;
pub mod verdict;
mod words;

use std::{
    collections::BTreeMap,
    future::pending,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{
        mpsc::{self, UnboundedSender},
        watch,
    },
    task::{AbortHandle, JoinSet},
    time::sleep_until,
};

pub use self::{command::WorkCommand, http::WorkServer, place::WorkPlace};
use self::{
    desk::{Desk, DeskPlan, DeskStep, SettledMessage, WorkOutcome},
    job::{JobEnd, JobOrder},
    printer::Printer,
    verdict::{DelayGrowth, WorkVerdict, judge},
    words::{DoneWork, WorkCounts},
};
use crate::{
    client::{Client, Refused, plain},
    clock,
    pb::{ConsumeRequest, ConsumeResponse, Delivery},
    signals::Signals,
    simulated::fill_random,
};

/// Frames of the proxy that may wait for the worker.
const MOST_FRAMES: usize = 64;
/// How long a stop waits for its last settlements, in addition to the time to end the work.
const LAST_SETTLEMENTS: Duration = Duration::from_secs(5);
/// The time from one line of progress to the next.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Which outputs of commands are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShownOutput {
    /// Those of all messages.
    All,
    /// Those of messages that are not acked.
    Failed,
    /// None.
    None,
}

/// A worker, before it begins.
#[derive(Debug)]
pub struct Work {
    /// The proxy.
    pub client: Client,
    /// The messages to take, and how.
    pub plan: DeskPlan,
    /// The place of the work.
    pub place: WorkPlace,
    /// The delays of Naks that name none.
    pub growth: DelayGrowth,
    /// Whether the last line of standard output names the delay of a Nak.
    pub reads_delay: bool,
    /// How long work may take to end after a signal, until it is ended.
    pub stop_timeout: Duration,
    /// How long ended work may take, from SIGTERM to SIGKILL.
    pub kill_after: Duration,
    /// Which outputs are shown.
    pub shown: ShownOutput,
    /// Whether to print JSON.
    pub json: bool,
}

/// Why the worker has ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The worker cannot continue.
    #[error("{}", plain(.0))]
    Ended(String),
    /// The system refuses signals, a thread, or random bytes.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// Something that happens to a running worker.
enum Happening {
    Frame(u64, Box<ConsumeResponse>),
    End(u64, Option<Refused>),
}

/// A job that has ended.
struct JobDone {
    key: u64,
    began: Instant,
    attempt: u32,
    end: io::Result<JobEnd>,
}

/// A running worker.
struct Runner {
    work: Work,
    place: Arc<WorkPlace>,
    desk: Desk,
    happenings: mpsc::Sender<Happening>,
    streams: BTreeMap<u64, (Option<UnboundedSender<ConsumeRequest>>, AbortHandle)>,
    readers: JoinSet<()>,
    jobs: JoinSet<JobDone>,
    orders: BTreeMap<u64, watch::Sender<JobOrder>>,
    done: BTreeMap<u64, DoneWork>,
    counts: WorkCounts,
    printer: Printer,
    progress_at: Instant,
    /// Why no work can begin.
    unable: Option<String>,
}

/// How far the stop by signals is.
enum StopState {
    Running,
    /// The first signal came, and work that has not ended is ended at this time.
    Stopping(Instant, Instant),
    /// Work is being ended, and nothing is waited for after this time.
    Ending(Instant),
}

impl Work {
    /// Works until a signal, or until as much is done as was asked for.
    ///
    /// # Errors
    /// See [`WorkError`].
    pub async fn run(self) -> Result<(), WorkError> {
        let mut signals = Signals::listen()?;
        let now = clock::now();
        let (happenings, mut happened) = mpsc::channel(MOST_FRAMES);
        let mut runner = Runner {
            place: Arc::new(self.place.clone()),
            desk: Desk::new(self.plan.clone(), now),
            work: self,
            happenings,
            streams: BTreeMap::new(),
            readers: JoinSet::new(),
            jobs: JoinSet::new(),
            orders: BTreeMap::new(),
            done: BTreeMap::new(),
            counts: WorkCounts::default(),
            printer: Printer::start()?,
            progress_at: now,
            unable: None,
        };
        let mut stop = StopState::Running;
        runner.perform()?;
        while !runner.desk.is_over() {
            let wake = runner.desk.wake(clock::now());
            let (first_at, deadline) = match stop {
                StopState::Running => (None, None),
                StopState::Stopping(first_at, deadline) => (Some(first_at), Some(deadline)),
                StopState::Ending(deadline) => (None, Some(deadline)),
            };
            let signal = async {
                match (first_at, deadline) {
                    (None, None) => signals.next().await,
                    (Some(first_at), _) => signals.second(first_at).await,
                    (None, Some(_)) => pending().await,
                }
            };
            tokio::select! {
                Some(happening) = happened.recv() => runner.take(happening),
                Some(done) = runner.jobs.join_next() => runner.end_of_job(done.ok())?,
                Some(_) = runner.readers.join_next() => {}
                () = sleep_until(wake.into()) => {}
                () = signal => stop = runner.signalled(&stop),
                () = clock::sleep_until(deadline) => stop = runner.late(&stop),
            }
            // All that has happened by now goes into the same frame.
            while let Ok(happening) = happened.try_recv() {
                runner.take(happening);
            }
            while let Some(done) = runner.jobs.try_join_next() {
                runner.end_of_job(done.ok())?;
            }
            runner.perform()?;
        }
        runner.finish()
    }
}

impl Runner {
    fn take(&mut self, happening: Happening) {
        let now = clock::now();
        match happening {
            Happening::Frame(id, frame) => self.desk.frame(now, id, *frame),
            Happening::End(id, refused) => {
                self.streams.remove(&id);
                self.desk.ended(now, id, refused);
            }
        }
    }

    fn signalled(&mut self, stop: &StopState) -> StopState {
        let now = clock::now();
        match stop {
            StopState::Running => {
                let seconds = self.work.stop_timeout.as_secs();
                let at_work = self.desk.at_work();
                self.printer.error(&format!(
                    "stopping: {at_work} at work, for at most {seconds} s; a second signal gives back at once"
                ));
                self.desk.stop(now);
                StopState::Stopping(now, now + self.work.stop_timeout)
            }
            StopState::Stopping(..) | StopState::Ending(_) => {
                self.printer.error("second signal: giving back at once");
                self.desk.give_back(now);
                self.orders.values().for_each(|order| _ = order.send_replace(JobOrder::Kill));
                StopState::Ending(now + LAST_SETTLEMENTS)
            }
        }
    }

    /// A deadline of the stop has passed.
    fn late(&mut self, stop: &StopState) -> StopState {
        let now = clock::now();
        match stop {
            StopState::Running | StopState::Stopping(..) => {
                let at_work = self.desk.at_work();
                self.printer.error(&format!("ending {at_work} at work, and giving back"));
                self.desk.give_back(now);
                StopState::Ending(now + self.work.kill_after + LAST_SETTLEMENTS)
            }
            StopState::Ending(_) => {
                self.desk.give_up();
                self.orders.values().for_each(|order| _ = order.send_replace(JobOrder::Kill));
                StopState::Ending(now + LAST_SETTLEMENTS)
            }
        }
    }

    /// Performs the steps of the desk.
    fn perform(&mut self) -> io::Result<()> {
        for step in self.desk.steps(clock::now()) {
            match step {
                DeskStep::Open(id) => self.open(id),
                DeskStep::Send(id, frame) => {
                    if let Some((Some(send), _)) = self.streams.get(&id) {
                        // A stream that is gone says so itself.
                        let _ = send.send(frame);
                    }
                }
                DeskStep::HalfClose(id) => {
                    if let Some((send, _)) = self.streams.get_mut(&id) {
                        *send = None;
                    }
                }
                DeskStep::Drop(id) => {
                    if let Some((_, reader)) = self.streams.remove(&id) {
                        reader.abort();
                    }
                }
                DeskStep::Begin(key, message) => self.begin(key, *message),
                DeskStep::EndWork(key) => {
                    if let Some(order) = self.orders.get(&key) {
                        order.send_if_modified(|order| {
                            let is_new = *order < JobOrder::End;
                            *order = JobOrder::End.max(*order);
                            is_new
                        });
                    }
                }
                DeskStep::Settled(message) => self.report(&message),
                DeskStep::Note(text) => self.printer.error(&format!("note: {}", plain(&text))),
            }
        }
        let now = clock::now();
        if self.printer.has_terminal && now >= self.progress_at {
            self.progress_at = now + PROGRESS_INTERVAL;
            let line = format!("{} at work, {}", self.desk.at_work(), self.counts.text());
            self.printer.progress(line);
        }
        Ok(())
    }

    fn open(&mut self, id: u64) {
        let (send, requests) = mpsc::unbounded_channel();
        let (client, happenings) = (self.work.client.clone(), self.happenings.clone());
        let reader = self.readers.spawn(async move {
            let read = async {
                let mut frames = client.consume(requests).await?;
                while let Some(frame) = frames.next().await? {
                    let _ = happenings.send(Happening::Frame(id, Box::new(frame))).await;
                }
                Ok(())
            };
            let refused = read.await.err();
            let _ = happenings.send(Happening::End(id, refused)).await;
        });
        self.streams.insert(id, (Some(send), reader));
    }

    fn begin(&mut self, key: u64, message: Delivery) {
        let (order, orders) = watch::channel(JobOrder::Continue);
        self.orders.insert(key, order);
        let (place, began, attempt) = (self.place.clone(), clock::now(), message.delivery_count);
        let DeskPlan { stream, consumer, .. } = &self.work.plan;
        let (stream, consumer) = (stream.clone(), consumer.clone());
        self.jobs.spawn(async move {
            let end = place.work(&stream, &consumer, message, orders).await;
            JobDone { key, began, attempt, end }
        });
    }

    /// `None`: the job has panicked, which is a defect.
    fn end_of_job(&mut self, done: Option<JobDone>) -> io::Result<()> {
        let now = clock::now();
        let Some(JobDone { key, began, attempt, end }) = done else {
            return Err(io::Error::other("the work on a message has panicked"));
        };
        self.orders.remove(&key);
        let JobEnd { end, is_ended, is_reached, output } = match end {
            Ok(end) => end,
            Err(error) => {
                let why = format!("the command cannot be started: {error}");
                self.desk.unable(now, key, &why);
                self.unable.get_or_insert(why);
                return Ok(());
            }
        };
        let mut random = [0; 4];
        fill_random(&mut random).map_err(io::Error::other)?;
        let growing = self.work.growth.delay(attempt, u32::from_ne_bytes(random));
        let verdict = match is_ended {
            // Many programs exit with 0 after a SIGTERM, whatever they have done.
            true => WorkVerdict::Nak { delay: growing, why: "ended by the worker".to_owned() },
            false => judge(&end, self.work.reads_delay, growing),
        };
        if self.desk.holds(key) {
            self.done.insert(key, DoneWork { took: now - began, output });
        }
        self.desk.done(now, key, verdict, is_reached);
        Ok(())
    }

    fn report(&mut self, message: &SettledMessage) {
        self.counts.count(message.outcome);
        let work = self.done.remove(&message.key);
        let shows = match self.work.shown {
            ShownOutput::All => true,
            ShownOutput::Failed => message.outcome != WorkOutcome::Acked,
            ShownOutput::None => false,
        };
        let said = if self.work.json { words::json } else { words::text };
        self.printer.out(said(message, work, shows));
    }

    fn finish(mut self) -> Result<(), WorkError> {
        self.printer.error(&format!("ended: {}", self.counts.text()));
        let failure = self.desk.failure().map(str::to_owned);
        match failure.or(self.unable) {
            Some(why) => Err(WorkError::Ended(why)),
            None => Ok(()),
        }
    }
}
