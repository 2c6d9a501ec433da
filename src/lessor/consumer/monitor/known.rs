//! The knowledge of one consumer, from when it was read to when it is gone, made again or reset.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    counting::{Counting, CountingNews, DeliveryCount},
    types::{ConsumerView, LeaderSigns, MonitorStep},
};
use crate::lessor::sighting::Sighting;

/// The longest time between two questions while leases are held,
const LONGEST_REFRESH: Duration = Duration::from_secs(30);
/// and the same if another server may lead the consumer at any time, which only INFO tells.
const ELSEWHERE_REFRESH: Duration = Duration::from_secs(1);
/// An answer that is expected and late is waited for this long, before nothing is pulled any more.
const LATE_ANSWER: Duration = Duration::from_secs(2);
/// The consumer is the known one for this long after a proof. A busy worker pauses for less between two
/// Fetch calls, so a busy consumer is not read more often for this.
const SURE: Duration = Duration::from_secs(1);
/// Callers hear after this that a known consumer is gone. A program needs milliseconds to make it again.
const GONE: Duration = Duration::from_millis(500);

/// Whether a consumer is known.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Knowledge {
    /// It was never read.
    Unknown,
    Known(Known),
    /// INFO says since then that there is no such consumer; before that it was known.
    Gone {
        since: Instant,
    },
}

impl Knowledge {
    pub(super) fn known(&self) -> Option<&Known> {
        match self {
            Self::Known(known) => Some(known),
            Self::Unknown | Self::Gone { .. } => None,
        }
    }

    pub(super) fn known_mut(&mut self) -> Option<&mut Known> {
        match self {
            Self::Known(known) => Some(known),
            Self::Unknown | Self::Gone { .. } => None,
        }
    }

    /// As far as can be seen, nobody leads the consumer.
    pub(super) fn missed(&mut self) {
        if let Some(known) = self.known_mut() {
            known.missed();
        }
    }

    /// The next pull needs a proof first that this is the consumer.
    pub(super) fn be_unsure(&mut self) {
        self.known_mut().into_iter().for_each(Known::be_unsure);
    }

    /// INFO says that there is no such consumer. Returns the step that follows.
    pub(super) fn gone(&mut self, now: Instant) -> Option<MonitorStep> {
        match self {
            Self::Known(_) => {
                *self = Self::Gone { since: now };
                Some(MonitorStep::EndLeases)
            }
            Self::Gone { since } if now.saturating_duration_since(*since) < GONE => None,
            Self::Gone { .. } | Self::Unknown => Some(MonitorStep::Stop),
        }
    }

    /// INFO has to be read again on the present connection.
    pub(super) fn reread(&mut self) {
        if let Some(known) = self.known_mut() {
            known.read_on = None;
        }
    }

    /// A consumer of this name that was made then is not the one that was known.
    pub(super) fn is_made_again(&self, created: &Arc<str>) -> bool {
        match self {
            Self::Unknown => false,
            Self::Known(known) => known.view.created != *created,
            Self::Gone { .. } => true,
        }
    }
}

/// See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Known {
    /// As last read. `delivered` is 0 again after a reset.
    pub(super) view: ConsumerView,
    /// The number of the connection on which INFO was read.
    pub(super) read_on: Option<u64>,
    pub(super) trust: LeaderTrust,
    /// When the last question was asked whose answer named the present leader.
    leader_seen_at: Instant,
    /// Since then somebody has found nobody who leads.
    missed: bool,
    /// The highest consumer sequence and stream sequence that have arrived, or had been delivered before
    /// this replica pulled.
    arrived: (u64, u64),
    /// The highest consumer sequence of leases that were taken over from another replica.
    taken_over: u64,
    counting: Counting,
    /// When an arrival or INFO last showed that this is the consumer.
    sure_at: Option<Instant>,
}

/// The knowledge of a monitor that has ended, for the monitor that follows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LeftKnowledge(Known);

impl LeftKnowledge {
    pub(super) fn of(known: &Known) -> Self {
        Self(Known { read_on: None, trust: LeaderTrust::Sure, ..known.clone() })
    }

    pub(super) fn resume(self) -> Knowledge {
        Knowledge::Known(self.0)
    }
}

/// Whether leases may be settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum LeaderTrust {
    Sure,
    InDoubt,
}

/// The findings of another answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeaderChange {
    pub(super) signs: LeaderSigns,
    /// When the old leader was last seen.
    pub(super) since: Instant,
    /// The consumer was reset: all leases are void.
    pub(super) reset: bool,
    /// A new leader has lost the last deliveries.
    pub(super) lost: bool,
}

/// The meaning of a sighting of another replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hearing {
    /// That replica has read another consumer of this name.
    pub(super) another: bool,
    /// All older leases are void.
    pub(super) void: bool,
    /// INFO still has to show what is so.
    pub(super) look: bool,
}

/// The findings of deliveries that have arrived together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) what: DeliveryCount,
    /// The sequence that shows it.
    pub(super) sequence: u64,
    /// How many deliveries, from the first one on, are void.
    pub(super) void: usize,
}

impl Known {
    /// The consumer was read for the first time. The question was asked at `asked_at`.
    pub(super) fn new(
        view: ConsumerView,
        read_on: Option<u64>,
        asked_at: Instant,
        now: Instant,
    ) -> Self {
        Self {
            read_on,
            trust: LeaderTrust::Sure,
            leader_seen_at: asked_at,
            missed: false,
            arrived: (view.delivered, view.delivered_stream),
            taken_over: 0,
            counting: Counting::new(view.delivered, now),
            sure_at: None,
            view,
        }
    }

    /// The consumer was read again. `known`: the highest delivery that was known when the question was asked.
    pub(super) fn read_again(
        &mut self,
        view: ConsumerView,
        asked_at: Instant,
        known: u64,
        now: Instant,
    ) -> LeaderChange {
        let before = std::mem::replace(&mut self.view, view);
        let since = std::mem::replace(&mut self.leader_seen_at, asked_at);
        let missed = std::mem::take(&mut self.missed);
        let ConsumerView { leader, leader_shows, delivered, delivered_stream, .. } = self.view;
        let (changed, forgotten) = (before.leader != leader, delivered < known);
        let signs = LeaderSigns {
            // If a server that is alone has started again, the connection tells so sooner.
            another: changed && self.view.is_led_elsewhere(),
            missed: missed && !leader_shows,
            forgotten,
        };
        // A server that crashed knows what it had stored: only later deliveries are lost. Nothing but a reset
        // makes the same leader count from the beginning again.
        let reset = forgotten && !changed;
        if reset {
            self.counting.went_down(delivered, now);
            self.void();
        }
        if forgotten {
            self.counting.lost(delivered);
            self.arrived = (delivered, delivered_stream);
            self.taken_over = self.taken_over.min(delivered);
        }
        self.trust = LeaderTrust::Sure;
        LeaderChange { signs, since, reset, lost: forgotten && changed }
    }

    /// Another replica has seen something of the consumer of this name.
    pub(super) fn hear(&mut self, sighting: &Sighting, now: Instant) -> Hearing {
        if self.view.created != sighting.created {
            self.be_unsure();
            return Hearing { another: true, void: false, look: true };
        }
        let heard = self.counting.heard(sighting, now);
        let unsaid = match heard {
            CountingNews::Known => !sighting.began,
            CountingNews::Perhaps => true,
            CountingNews::Again => false,
        };
        // INFO still shows whether sequences went down.
        let look = unsaid && sighting.delivered < self.highest();
        Hearing { another: false, void: heard == CountingNews::Again, look }
    }

    /// Looks at the deliveries that have arrived.
    pub(super) fn count(&mut self, deliveries: &[(u64, u64)], now: Instant) -> Counted {
        self.sure_at = Some(now);
        let mut counted = Counted { what: DeliveryCount::On, sequence: 0, void: 0 };
        for (index, (sequence, _)) in deliveries.iter().enumerate() {
            let (what, sequence) = (self.counting.arrived(*sequence, now), *sequence);
            match what {
                DeliveryCount::On => {}
                DeliveryCount::Began | DeliveryCount::Perhaps => {
                    counted = Counted { what, sequence, ..counted };
                }
                // Earlier ones, which were read together with this one, are of the old counting.
                DeliveryCount::Again => counted = Counted { what, sequence, void: index },
            }
        }
        counted
    }

    /// Tells the other replicas what was seen.
    pub(super) fn announcement(&self, delivered: u64, began: bool, again: bool) -> MonitorStep {
        let (created, counting) = (self.view.created.clone(), self.counting.number());
        MonitorStep::Announce { created, delivered, began, again, counting }
    }

    pub(super) fn arrived(&mut self, deliveries: &[(u64, u64)]) {
        for (sequence, stream_sequence) in deliveries {
            let (highest, highest_stream) = self.arrived;
            self.arrived = (highest.max(*sequence), highest_stream.max(*stream_sequence));
        }
    }

    /// Leases with consumer sequences between these two were taken over from another replica.
    pub(super) fn take_over(&mut self, (lowest, highest): (u64, u64), now: Instant) {
        self.counting.adopted(lowest == 1, now);
        self.taken_over = self.taken_over.max(highest);
    }

    /// INFO was read on this connection. If it was so for the first time: where what JetStream has
    /// delivered, and did not arrive, begins.
    pub(super) fn read_on(&mut self, connection: u64) -> Option<Option<u64>> {
        if self.read_on.replace(connection) == Some(connection) {
            return None;
        }
        let ConsumerView { delivered, delivered_stream, .. } = self.view;
        let (highest, highest_stream) = self.arrived;
        self.arrived = (highest.max(delivered), highest_stream.max(delivered_stream));
        // New messages come in order, so none behind the one that is missing has arrived.
        Some((delivered > highest).then(|| highest_stream.saturating_add(1)))
    }

    /// All older leases are void, and so is what was known of their deliveries.
    pub(super) fn void(&mut self) {
        self.trust = LeaderTrust::Sure;
        (self.view.delivered, self.taken_over, self.arrived) = (0, 0, (0, 0));
    }

    /// Somebody has found nobody who leads the consumer.
    pub(super) fn missed(&mut self) {
        (self.missed, self.sure_at) = (true, None);
    }

    pub(super) fn be_sure(&mut self, now: Instant) {
        self.sure_at = Some(now);
    }

    pub(super) fn be_unsure(&mut self) {
        self.sure_at = None;
    }

    pub(super) fn is_sure(&self, now: Instant) -> bool {
        self.sure_at.is_some_and(|at| now.saturating_duration_since(at) < SURE)
    }

    /// INFO was read lately. It was not if nobody has needed it for a time.
    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        now < self.leader_seen_at + self.refresh() * 2 + LATE_ANSWER
    }

    /// How often INFO is asked while leases are held.
    pub(super) fn refresh(&self) -> Duration {
        let elsewhere = self.view.is_led_elsewhere();
        let longest = if elsewhere { ELSEWHERE_REFRESH } else { LONGEST_REFRESH };
        longest.min(self.view.ack_wait / 3)
    }

    /// The highest consumer sequence that is known to be delivered.
    pub(super) fn highest(&self) -> u64 {
        self.arrived.0.max(self.view.delivered).max(self.taken_over)
    }
}
