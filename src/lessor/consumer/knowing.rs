//! What a feed knows of its consumer and of the link: read from INFO, on every connection anew.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Asking, ConsumerTask, INFO_RETRY, INFO_TIMEOUT, OUTAGE_NOTICE, quarantine::Quarantine,
};
use crate::{
    broker::{Broker, ConsumerInfo, InfoError, Link},
    clock,
    lessor::table::LEASES_PER_LOCK,
    lessor::{Error, spec::ConsumerSpec},
};

/// A consumer that was known is looked for this long before callers are told that it is gone. A
/// program that deletes a consumer and makes it again needs milliseconds for that.
const DELETION_GRACE: Duration = Duration::from_millis(500);

/// Why the consumer cannot be read, and what the log has of it.
#[derive(Debug, Default)]
pub(super) struct Unread {
    why: Option<String>,
    /// The reason that was logged last.
    told: Option<String>,
    /// Since when INFO says that the consumer, which was known, is not there.
    gone_since: Option<Instant>,
}

impl Unread {
    /// The consumer was known, and is not there now. The feed itself looks for it again.
    pub(super) fn is_gone(&self) -> bool {
        self.gone_since.is_some()
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the consumer cannot be read")?;
        self.why.iter().try_for_each(|why| write!(f, ": {why}"))
    }
}

impl<B: Broker> ConsumerTask<B> {
    /// Asks INFO when it is due and opens an inbox when the consumer is known.
    pub(super) async fn prepare(&mut self) {
        let now = clock::now();
        let Link::Up(server) = &self.link else { return };
        let epoch = server.epoch;
        self.move_on(now);
        let needed = self.learned_on != Some(epoch) || self.pump.waiters() > 0;
        if self.must_look(now) {
            self.ask_at = self.ask_at.min(now);
        }
        if self.asking.is_none() && now >= self.ask_at {
            self.spared = !needed && self.held() == 0;
            if !self.spared {
                let (broker, name) = (self.lessor.clone(), self.name.clone());
                let until = now + INFO_TIMEOUT;
                self.leading.asks(self.seen.0, now);
                self.asking = Some(Box::pin(async move { broker.broker.info(&name, until).await }));
            }
        }
        let known = self.learned_on == Some(epoch) && self.looking.is_none();
        if self.inbox.is_none() && known && self.quarantine.fenced(now).is_none() {
            self.open(epoch, now).await;
        }
    }

    /// The connection that the inbox is on was replaced while it served. Nothing more is pulled on
    /// it, and when the last pull has ended it is left.
    pub(super) fn outdated(&self) -> bool {
        let Link::Up(server) = &self.link else { return false };
        self.inbox.is_some() && self.on.is_some_and(|on| on != server.epoch)
    }

    /// INFO was read lately; not so after a time in which nobody needed it.
    pub(super) fn fresh(&self, now: Instant) -> bool {
        now < self.leading.seen_at() + self.refresh() * 2 + INFO_TIMEOUT
    }

    pub(super) fn refresh(&self) -> Duration {
        self.spec.as_ref().map_or(INFO_RETRY, |spec| spec.refresh())
    }

    pub(super) fn linked(&mut self, link: Link, now: Instant) {
        let lost_at = self.away_since.unwrap_or(now);
        self.away_since = match &link {
            Link::Up(_) => None,
            Link::Down(_) | Link::Unsupported(_) => self.away_since.or(Some(now)),
        };
        if let Link::Up(server) = &link {
            if self.learned_on != Some(server.epoch) {
                self.ask_at = now;
            }
            if !self.sighted.heard_on(server.bus_epoch) {
                // It may have been made anew, and we were not there to be told.
                self.spec.iter().for_each(|spec| _ = spec.leadership.doubt());
                (self.asking, self.ask_at) = (None, now);
            }
            let known = self.server.replace(server.id.clone());
            let replicated = self.spec.as_ref().is_some_and(|spec| spec.replicated);
            // A server of several need not be the one that leads: INFO tells.
            if known.is_some_and(|last| last != server.id) && !replicated {
                self.distrust(lost_at);
            }
        }
        self.doubt(now);
        self.link = link;
    }

    /// # Errors
    /// Why the feed ends: the consumer is not there, or not one to lease from.
    pub(super) fn learned(
        &mut self,
        info: Result<ConsumerInfo, InfoError>,
        now: Instant,
    ) -> Result<(), Error> {
        self.asking = None;
        let info = match info {
            Ok(info) => info,
            Err(InfoError::Unavailable(why)) => {
                tracing::debug!(consumer = %self.name, why, "INFO");
                self.missed(now);
                self.ask_at = now + INFO_RETRY;
                self.away_since = self.away_since.or(Some(now));
                self.unread.why = Some(why);
                self.say_unread(now);
                return Ok(());
            }
            Err(error) => {
                if matches!(error, InfoError::NoStream | InfoError::NoConsumer) {
                    let known = self.spec.is_some();
                    self.end_leases();
                    if self.may_return(known, now) {
                        return Ok(());
                    }
                }
                return Err(Error::of_info(error, &self.name));
            }
        };
        let returned = self.unread.is_gone();
        self.read_again();
        if returned || self.spec.as_ref().is_some_and(|spec| spec.created != info.created) {
            tracing::info!(consumer = %self.name, "it was made anew: the leases of the old one end");
            self.end_leases();
            self.leading.forget();
            (self.quarantine, self.looking) = (Quarantine::none(), None);
        }
        // What is unsuitable now keeps the leases that it has.
        let known = self.spec.clone();
        let id = known.as_ref().map_or_else(|| self.lessor.next_consumer(), |spec| spec.id);
        let mut spec = ConsumerSpec::read(&self.name, id, &info)?;
        if let Some(known) = &known {
            spec.leadership = known.leadership.clone();
        }
        let spec = Arc::new(spec);
        let first = known.is_none();
        if let Some(known) = known.filter(|known| **known != *spec) {
            self.retune(&known, &spec);
        }
        self.pump.set_limits(spec.limits());
        self.spec = Some(spec);
        self.backlog = info.pending > 0 || info.ack_pending > 0;
        if first {
            self.introduce(&info, now);
        }
        self.led_by(&info, now);
        if let Link::Up(server) = &self.link
            && !self.outdated()
        {
            if self.learned_on.replace(server.epoch) != Some(server.epoch) {
                self.examine(info.delivered);
                self.seen = (info.delivered, info.delivered_stream);
            }
            self.away_since = None;
        }
        self.ask_at = now + self.refresh();
        self.answer_others(&info, now);
        self.tell_facts();
        Ok(())
    }

    /// INFO says that there is no such consumer. `true`: it was `known` until a moment ago, so INFO is
    /// asked again before anybody is told. Its leases have ended, and nothing is pulled meanwhile.
    fn may_return(&mut self, known: bool, now: Instant) -> bool {
        if known {
            self.unread.gone_since = Some(now);
            self.leading.forget();
            self.seen = (0, 0);
            self.learned_on = None;
        }
        self.sighted.unsure();
        self.ask_at = now + INFO_RETRY;
        self.unread
            .gone_since
            .is_some_and(|since| now.saturating_duration_since(since) < DELETION_GRACE)
    }

    /// Says in the log why the consumer cannot be read: once for each reason, when its callers are told.
    fn say_unread(&mut self, now: Instant) {
        let long = self.away_since.is_some_and(|since| now.duration_since(since) >= OUTAGE_NOTICE);
        let due = long && self.up();
        let Unread { why: Some(why), told, .. } = &mut self.unread else { return };
        if due && told.as_ref() != Some(why) && self.lessor.unread.allow(now) {
            tracing::warn!(consumer = %self.name, why, "the consumer cannot be read");
            *told = Some(why.clone());
        }
    }

    fn read_again(&mut self) {
        let Unread { told, .. } = std::mem::take(&mut self.unread);
        if told.is_some() {
            tracing::info!(consumer = %self.name, "the consumer can be read again");
        }
    }

    /// Tells those who want to know the consumer, once it is known on the present connection.
    pub(super) fn tell_facts(&mut self) {
        let Link::Up(server) = &self.link else { return };
        let known = self.spec.as_ref().filter(|_| self.learned_on == Some(server.epoch));
        if let Some(spec) = known {
            for curious in self.curious.drain(..) {
                let _ = curious.send(Ok(spec.clone()));
            }
        }
    }

    /// The consumer is not the one it was: nothing that was leased from it can be settled.
    pub(super) fn end_leases(&mut self) {
        if let Some(spec) = self.spec.take() {
            // First, for those that are just being taken over.
            spec.leadership.end();
            self.lessor.table.with(|table| table.end_consumer(spec.id));
        }
    }

    pub(super) fn retune(&self, old: &ConsumerSpec, new: &ConsumerSpec) {
        if (old.ack_wait, &old.backoff) != (new.ack_wait, &new.backoff) {
            tracing::info!(consumer = %self.name, "its ack wait has changed");
            let ack_wait = |count| new.ack_wait_of(count);
            self.lessor
                .in_steps(|table, after| table.retune(new.id, ack_wait, after, LEASES_PER_LOCK));
        }
    }

    /// The server may have forgotten, then or later, what it had promised just before.
    pub(super) fn distrust(&self, when: Instant) {
        if let Some(spec) = &self.spec {
            self.lessor
                .in_steps(|table, after| table.distrust(spec.id, when, after, LEASES_PER_LOCK));
        }
    }
}

/// What INFO says, while it is asked.
pub(super) async fn answer(asking: &mut Option<Asking>) -> Result<ConsumerInfo, InfoError> {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}
