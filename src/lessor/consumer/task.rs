//! The loop of one consumer's task: waits for events, and has the [`Performer`] act on them.
//!
//! 1. Every caller is answered once, also when the task ends.
//! 2. The task stays while leases are held, in a drain too: it alone hears that another server leads.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    announcer::HeldBack,
    described::describe,
    handle::{ConsumerCommand, ConsumerHandle},
    performer::Performer,
    quarantine::SearchResult,
    subscription::SubscriptionEvent,
};
use crate::{
    broker::{Broker, ConsumerInfo, ConsumerName, InfoError},
    clock,
    lessor::{Error, core::Core, flow_queue::FlowEnd},
    metrics::ReleaseCause,
};

/// A pull that lacks a lease permit is tried again after this: leases of the consumer itself may have ended.
const STARVED_RETRY: Duration = Duration::from_millis(100);

/// See the [module](self).
pub(in crate::lessor) struct ConsumerTask<B: Broker> {
    core: Arc<Core<B>>,
    name: ConsumerName,
    commands: mpsc::UnboundedReceiver<ConsumerCommand>,
    performer: Performer<B>,
    draining: bool,
    /// There was more than one caller after the last event.
    several: bool,
}

enum TaskEvent {
    Drain,
    Info(Result<ConsumerInfo, InfoError>),
    OthersKnow,
    Searched(SearchResult),
    Subscription(SubscriptionEvent),
    Command(ConsumerCommand),
    Deadline,
}

impl<B: Broker> ConsumerTask<B> {
    /// The task of a consumer, and the way to it. [`ConsumerTask::run`] runs it.
    pub(in crate::lessor) fn new(core: Arc<Core<B>>, name: ConsumerName) -> (ConsumerHandle, Self) {
        let (handle, commands) = ConsumerHandle::new();
        let performer = Performer::new(core.clone(), name.clone(), handle.clone());
        (handle, Self { core, name, commands, performer, draining: false, several: false })
    }

    /// Runs until the consumer is gone, nobody has used it for long, or the lessor is closed. In a drain it
    /// runs until there is nothing left to watch over.
    pub(in crate::lessor) async fn run(mut self) {
        let end = loop {
            self.performer.prepare().await;
            self.performer.perform().await;
            self.performer.callers.show();
            let now = clock::now();
            if self.is_drained(now) || self.is_idle(now) {
                break Error::Draining;
            }
            let Some(event) = self.next_event(now).await else { break Error::Draining };
            if let Err(end) = self.take(event) {
                break end;
            }
            self.gather().await;
        };
        self.finish(&end);
    }

    /// Waits for the next thing to happen. `None` once the lessor is closed. The order of the branches is
    /// their priority; the [module above](super) says it in words.
    async fn next_event(&mut self, now: Instant) -> Option<TaskEvent> {
        let deadline = self.next_deadline(now);
        let Self { core, commands, performer, draining, .. } = self;
        let Performer { info, announcer, poison, subscription, .. } = performer;
        tokio::select! {
            biased;
            () = core.closed.cancelled() => None,
            () = core.draining.cancelled(), if !*draining => Some(TaskEvent::Drain),
            info = info.next() => Some(TaskEvent::Info(info)),
            () = announcer.known() => Some(TaskEvent::OthersKnow),
            result = poison.next() => Some(TaskEvent::Searched(result)),
            event = subscription.next() => Some(TaskEvent::Subscription(event)),
            command = commands.recv() => command.map(TaskEvent::Command),
            () = clock::sleep_until(Some(deadline)) => Some(TaskEvent::Deadline),
        }
    }

    fn next_deadline(&self, now: Instant) -> Instant {
        let Performer { callers, monitor, subscription, .. } = &self.performer;
        let idle = callers.idle_at() + Duration::from_millis(1);
        let starved = callers.pump.starved().then(|| now + STARVED_RETRY);
        let pump = callers.pump.next_deadline(now);
        let (waiting, streams) = match monitor.away(now) {
            // Older streams hear of it later than the others.
            Some((since, long_at)) => {
                (callers.are_impatient(since), Some(long_at).filter(|_| callers.has_flows()))
            }
            None => (callers.are_waiting(), None),
        };
        let monitor = monitor.next_deadline(waiting);
        [starved, pump, monitor, streams, subscription.next_deadline(), self.performer.silent_at()]
            .into_iter()
            .flatten()
            .fold(idle.max(now + Duration::from_secs(1)), Instant::min)
    }

    /// # Errors
    /// Why the task ends.
    fn take(&mut self, event: TaskEvent) -> Result<(), Error> {
        let now = clock::now();
        let performer = &mut self.performer;
        match event {
            TaskEvent::Drain => {
                self.draining = true;
                performer.callers.pump.drain(now);
            }
            TaskEvent::Info(info) => performer.answered(&info, now)?,
            TaskEvent::OthersKnow => performer.others_know(now),
            TaskEvent::Searched(result) => performer.searched(&result, now),
            TaskEvent::Subscription(event) => performer.subscribed(event, now),
            TaskEvent::Command(command) => self.command(command, now),
            TaskEvent::Deadline => {}
        }
        self.performer.tell_outage(now);
        Ok(())
    }

    /// Takes in who else is about to join, so that one pull is for all of them: callers that were answered
    /// together come back together. A caller that is alone is not delayed: a yield looks for all input of the process.
    async fn gather(&mut self) {
        let several = |task: &Self| task.performer.callers.count() > 1;
        let pulls = self.performer.callers.pump.demand(clock::now()).is_some();
        if pulls && (self.several || several(self)) {
            tokio::task::yield_now().await;
        }
        while let Ok(command) = self.commands.try_recv() {
            self.command(command, clock::now());
        }
        self.several = several(self);
    }

    fn command(&mut self, command: ConsumerCommand, now: Instant) {
        if let ConsumerCommand::Describe(reply) = command {
            let Performer { callers, info, poison, .. } = &self.performer;
            let _ = reply.send(describe(callers, info, poison, now));
        } else {
            self.performer.command(command, now);
        }
    }

    fn is_idle(&self, now: Instant) -> bool {
        let idle = self.performer.callers.pump.is_idle() && now > self.performer.callers.idle_at();
        idle && self.performer.leases.held() == 0
    }

    /// Nobody waits any more, and no lease is held of which the task would have to know who leads.
    fn is_drained(&mut self, now: Instant) -> bool {
        let busy =
            self.performer.announcer.is_announcing() || self.performer.callers.has_replicas();
        if !self.draining || self.performer.callers.are_waiting() || busy {
            return false;
        }
        let unhanded = self.performer.callers.pump.take_parked();
        // Nobody can take a last attempt any more, and the next holder would not have the message itself.
        let last = unhanded.iter().filter(|granted| granted.last_attempt()).count();
        if last > 0 {
            let consumer = &self.name;
            tracing::warn!(%consumer, last, "last attempts that no worker has taken are lost");
        }
        self.performer.leases.release(unhanded, ReleaseCause::Drain, now);
        self.performer.leases.held() == 0
    }

    /// Answers whoever is left, and those who join in the last moment.
    fn finish(mut self, end: &Error) {
        if self.performer.monitor.is_contradicted() {
            // Nobody is left to find out which of the two consumers it is.
            self.performer.leases.end();
        }
        self.performer.leases.leave(self.performer.monitor.leave());
        self.commands.close();
        // Nobody is left to end a doubt.
        self.performer.leases.trust();
        let now = clock::now();
        self.performer.callers.fail(end, now);
        self.performer.callers.tell_spec(&Err(end.clone()));
        let mut unhanded = self.performer.callers.pump.take_parked();
        for held_back in self.performer.announcer.finish() {
            match held_back {
                HeldBack::Message(granted) => unhanded.push(granted),
                HeldBack::End(..) => {}
            }
        }
        while let Ok(command) = self.commands.try_recv() {
            match command {
                ConsumerCommand::Join { reply, .. } => drop(reply.send(Err(end.clone()))),
                ConsumerCommand::GiveBack(granted) | ConsumerCommand::Return(granted) => {
                    unhanded.extend(granted);
                }
                ConsumerCommand::Open { queue, .. } => queue.end(FlowEnd::Failed(end.clone())),
                ConsumerCommand::Know(question) => drop(question.reply.send(Err(end.clone()))),
                ConsumerCommand::Leave(_)
                | ConsumerCommand::Credit(..)
                | ConsumerCommand::Freed(_)
                | ConsumerCommand::Stall(..)
                | ConsumerCommand::Close(_)
                | ConsumerCommand::IsFull(_)
                | ConsumerCommand::Doubt { .. }
                | ConsumerCommand::Led(_)
                | ConsumerCommand::Acked(_)
                | ConsumerCommand::Adopted(_)
                | ConsumerCommand::Describe(_)
                | ConsumerCommand::Heard(..) => {}
            }
        }
        self.performer.leases.release(unhanded, ReleaseCause::Drain, now);
    }
}
