//! What a feed tells the other replicas of its consumer before it hands out anything more of it, and
//! what it makes of what they tell. Owns the rule that nothing is pulled on an old view of the consumer.
//!
//! ```text
//!  INFO: first read, or made anew ──┐
//!  arrival: counted from 1, or anew ┼─▶ TELLING ── all have answered, or 1 s ──▶ pulls, hands out
//!  INFO: fewer deliveries than known┘
//!
//!  heard: other `created` ──▶ in doubt until INFO is read again ──▶ answered
//!  heard: counted anew    ──▶ older leases end ───────────────────▶ answered
//! ```
//! 1. While the others are told nothing is pulled, and what has arrived is kept back.
//! 2. An answer means: nothing that the sighting voids is settled here any more.
//! 3. A pull follows another pull, or an INFO, within a second: an open pull ends with its consumer,
//!    so nothing is leased under the name of a consumer that has been replaced.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    ConsumerTask, INFO_RETRY,
    counting::{Counting, DeliveryCount},
    single::Single,
};
use crate::{
    broker::{Arrival, Broker, ConsumerInfo, PullEnd, Server},
    lessor::{delivery::GrantedDelivery, sighting::Sighting, spec::encoded_size},
};

/// What was seen of a consumer this long ago is still so: it is longer than a busy worker pauses between
/// two Fetch calls, so that a busy consumer is not read more often for this.
const SURE: Duration = Duration::from_secs(1);
/// A replica that has read a newer consumer is believed for so long against an INFO that is older.
const BELIEVED: Duration = Duration::from_secs(2);

pub(super) type Told = Pin<Box<dyn Future<Output = ()> + Send>>;

enum Kept {
    Message(GrantedDelivery),
    End(u64, PullEnd),
}

/// See the [module](self).
pub(super) struct Sighted {
    counting: Counting,
    /// Whether pulls have more than one answer.
    pub(super) single: Single,
    /// The others are being told.
    pub(super) telling: Option<Told>,
    /// What has arrived meanwhile, in its order.
    kept_back: VecDeque<Kept>,
    /// When the consumer was last certain to be the one that is known.
    sure_at: Option<Instant>,
    /// Replicas that wait until INFO has been read again.
    asking: Vec<oneshot::Sender<()>>,
    /// When another replica has read which consumer, if it is not the one that is known.
    other: Option<(Arc<str>, Instant)>,
    /// The connection over which the others are heard.
    heard_on: Option<u64>,
}

impl Sighted {
    pub(super) fn new(server: Option<&Arc<Server>>, now: Instant) -> Self {
        Self {
            counting: Counting::new(0, now),
            single: Single::default(),
            telling: None,
            kept_back: VecDeque::new(),
            sure_at: None,
            asking: Vec::new(),
            other: None,
            heard_on: server.map(|server| server.bus_epoch),
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.telling.is_some() || !self.asking.is_empty()
    }

    /// The consumer may not be what it was.
    pub(super) fn unsure(&mut self) {
        self.sure_at = None;
    }

    /// What arrives proves that the consumer of the open pull is there.
    pub(super) fn sure(&mut self, now: Instant) {
        self.sure_at = Some(now);
    }

    pub(super) fn is_sure(&self, now: Instant) -> bool {
        self.sure_at.is_some_and(|at| now.saturating_duration_since(at) < SURE)
    }

    /// The others are heard on this connection from now on. `false`: they were not in between.
    pub(super) fn heard_on(&mut self, connection: u64) -> bool {
        self.heard_on.replace(connection).is_none_or(|last| last == connection)
    }

    /// A consumer that others have read is not the one that is known here.
    pub(super) fn contradicted(&self) -> bool {
        self.other.is_some()
    }
}

impl<B: Broker> ConsumerTask<B> {
    /// Nothing stands against a pull.
    pub(super) fn may_pull(&self, now: Instant) -> bool {
        let known = self.spec.is_some();
        known && self.sighted.telling.is_none() && self.sighted.is_sure(now)
    }

    /// A pull is wanted and the view of the consumer is too old for one. A consumer that cannot be read
    /// is asked for again by the feed itself.
    pub(super) fn must_look(&self, now: Instant) -> bool {
        let wanted = self.pump.waiters() > 0 && !self.pump.has_pull();
        let by_itself = self.away_since.is_some() || self.unread.is_gone();
        wanted && !by_itself && !self.sighted.is_sure(now)
    }

    /// The consumer was read, for the first time or as a new one: whoever holds leases of an older one
    /// must know before anything of this one is handed out.
    pub(super) fn introduce(&mut self, info: &ConsumerInfo, now: Instant) {
        self.sighted.counting = Counting::new(info.delivered, now);
        self.seen = (info.delivered, info.delivered_stream);
        self.tell(info.delivered, DeliveryCount::On);
    }

    /// INFO knows fewer deliveries than before, and its leader did not change: the consumer was reset.
    pub(super) fn reset(&mut self, delivered: u64, now: Instant) {
        if self.sighted.counting.heard_again(now) {
            self.void();
            self.tell(delivered, DeliveryCount::Again);
        }
    }

    /// Looks at the sequences of what has arrived on the present inbox, before it is leased.
    pub(super) fn count(&mut self, now: Instant) {
        let (mut what, mut from) = (DeliveryCount::On, 0);
        for (place, arrival) in self.arrivals.iter().enumerate() {
            let Arrival::Message(delivery) = arrival else { continue };
            match self.sighted.counting.arrived(delivery.consumer_sequence, now) {
                DeliveryCount::On => {}
                DeliveryCount::Began => what = DeliveryCount::Began,
                DeliveryCount::Again => (what, from) = (DeliveryCount::Again, place),
            }
        }
        if what == DeliveryCount::Again {
            // What has arrived before in the same breath is of the old counting, and void with it.
            let mut places = 0..;
            self.arrivals.retain(|arrival| {
                let place = places.next().unwrap_or(from);
                place >= from || matches!(arrival, Arrival::End { .. })
            });
            self.void();
        }
        if what != DeliveryCount::On {
            self.tell(0, what);
        }
    }

    /// Looks whether answers to pulls are lost on their way.
    pub(super) fn watch_answers(&mut self, now: Instant) {
        for arrival in &self.arrivals {
            let single = &mut self.sighted.single;
            match arrival {
                Arrival::Message(delivery) => {
                    if let Some(missed) = single.arrived(delivery.consumer_sequence, now) {
                        tracing::warn!(
                            consumer = %self.name,
                            missed,
                            "only the first message of each pull arrives: the export of the JetStream API needs response_type: stream"
                        );
                    }
                }
                Arrival::End { no, .. } => single.ended(*no),
            }
        }
    }

    /// Leases that were granted before are over: their messages are delivered anew.
    fn void(&mut self) {
        let Some(spec) = self.spec.clone() else { return };
        tracing::warn!(consumer = %self.name, "its deliveries are counted anew: older leases end");
        self.end_leases();
        self.spec = Some(Arc::new(spec.counted_anew(self.lessor.next_consumer())));
        self.leading.forget();
        self.seen = (0, 0);
        // An answer on its way may be older, or not be, and does not tell.
        if self.asking.take().is_some() {
            self.ask_at = self.leading.seen_at();
        }
    }

    fn tell(&mut self, delivered: u64, counted: DeliveryCount) {
        let Some(spec) = &self.spec else { return };
        let sighting = Sighting {
            name: self.name.clone(),
            created: spec.created.clone(),
            delivered,
            began: counted == DeliveryCount::Began,
            again: counted == DeliveryCount::Again,
        };
        let Some(told) = self.lessor.tell_others(sighting) else { return };
        let before = self.sighted.telling.take();
        self.sighted.telling = Some(Box::pin(async move {
            told.await;
            if let Some(before) = before {
                before.await;
            }
        }));
    }

    /// The others know. What was kept back is handed out.
    pub(super) fn told(&mut self, now: Instant) {
        self.sighted.telling = None;
        for kept in std::mem::take(&mut self.sighted.kept_back) {
            match kept {
                Kept::Message(granted) => self.hand_on(granted, now),
                Kept::End(no, end) => self.ended(no, end, now),
            }
        }
    }

    /// A delivery has been leased: it goes to the pump once the others know all that they must.
    pub(super) fn hand_on(&mut self, granted: GrantedDelivery, now: Instant) {
        if self.sighted.telling.is_some() {
            return self.sighted.kept_back.push_back(Kept::Message(granted));
        }
        let (size, last_attempt) = (encoded_size(&granted.delivery), granted.last_attempt());
        self.pump.arrived(granted, size, last_attempt, now);
    }

    /// A pull has ended: the pump hears of it behind all that the pull has brought.
    pub(super) fn end_on(&mut self, no: u64, end: PullEnd, now: Instant) {
        if self.sighted.telling.is_some() {
            return self.sighted.kept_back.push_back(Kept::End(no, end));
        }
        self.ended(no, end, now);
    }

    /// Takes out what nobody will be handed.
    pub(super) fn take_kept_back(&mut self) -> Vec<GrantedDelivery> {
        let kept = std::mem::take(&mut self.sighted.kept_back).into_iter();
        let granted = |kept| match kept {
            Kept::Message(granted) => Some(granted),
            Kept::End(..) => None,
        };
        kept.filter_map(granted).collect()
    }

    /// Another replica has seen something. `reply` is answered, or dropped, when nothing that this voids
    /// is settled here any more.
    pub(super) fn heard(&mut self, sighting: Sighting, reply: oneshot::Sender<()>, now: Instant) {
        let Some(spec) = self.spec.clone() else {
            // No lease is held, and an answer on its way may be older than this.
            if self.asking.take().is_some() {
                self.ask_at = now;
            }
            return;
        };
        let another = *spec.created != *sighting.created;
        if another {
            spec.leadership.doubt();
            self.sighted.unsure();
            self.sighted.other = Some((sighting.created, now));
        } else if sighting.began || sighting.again {
            let counting = &mut self.sighted.counting;
            let void = if sighting.began {
                counting.heard_beginning(now)
            } else {
                counting.heard_again(now)
            };
            if void {
                self.void();
            }
        }
        // It has not pulled yet, so INFO still shows whether sequences went down.
        let fewer = sighting.delivered < self.leading.known(self.seen.0);
        let look = another || fewer && !sighting.began && !sighting.again;
        if look && self.held() > 0 {
            self.sighted.asking.push(reply);
            (self.asking, self.ask_at) = (None, now);
        } else if look {
            self.sighted.unsure();
        }
    }

    /// INFO was read: answers those that wait for it, unless it is older than what they have read.
    pub(super) fn answer_others(&mut self, info: &ConsumerInfo, now: Instant) {
        self.sighted.sure_at = Some(now);
        if let Some((created, since)) = &self.sighted.other {
            let newer = later(created, &info.created);
            if newer && now.saturating_duration_since(*since) < BELIEVED {
                self.spec.iter().for_each(|spec| _ = spec.leadership.doubt());
                self.sighted.unsure();
                self.ask_at = now + INFO_RETRY;
                return;
            }
        }
        self.sighted.other = None;
        for reply in self.sighted.asking.drain(..) {
            let _ = reply.send(());
        }
    }
}

/// Of two times as JetStream writes them (RFC 3339, UTC, without zeros at the end): the first is later.
fn later(first: &str, second: &str) -> bool {
    first.trim_end_matches('Z') > second.trim_end_matches('Z')
}

/// What the others are told, while they are.
pub(super) async fn told(telling: &mut Option<Told>) {
    match telling {
        Some(telling) => telling.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_compared_with_and_without_a_fraction() {
        for (first, second) in [
            ("2026-11-29T08:00:01Z", "2026-11-29T08:00:00.9Z"),
            ("2026-11-29T08:00:00.5Z", "2026-11-29T08:00:00Z"),
            ("2026-11-29T08:00:00.55Z", "2026-11-29T08:00:00.5Z"),
            ("2026-11-30T00:00:00Z", "2026-11-29T23:59:59.999999999Z"),
        ] {
            assert!(later(first, second) && !later(second, first), "{first} and {second}");
        }
        assert!(!later("2026-11-29T08:00:00Z", "2026-11-29T08:00:00Z"));
    }
}
