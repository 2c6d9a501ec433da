//! The accidents as the checks know them: each with its kind, its place, its begin and its end. Pure.

use std::time::Duration;

use fetch_proxy::broker::ConsumerName;

use super::super::jetstream::Time;

/// An accident, by the kind of harm that it can do. A `side` is the number of a replica's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    /// The consumer has no leader, or gets another leader, or its server is away.
    LeaderAway,
    /// A server without copies starts again, and may forget.
    Restarted,
    /// The consumer is deleted and made again, or reset.
    MadeAgain,
    /// There is no such consumer.
    Absent,
    /// It is reset: nothing but the sequences of its deliveries shows that.
    Reset,
    /// The ack wait or another limit of the consumer changes.
    Configured,
    /// The consumer is paused.
    Paused,
    /// A message that breaks connections is in the stream.
    Poisoned,
    /// A token key is taken out of the key file.
    KeyRemoved,
    /// A new token key stands at the front of the file, and not every process has read it.
    KeyAtFront,
    /// The servers refuse a right.
    Refused,
    /// The policy of a replica takes the rights at the consumer away.
    Denied,
    /// The clocks of machines differ.
    ClockOff { side: usize },
    /// The clock of NATS is ahead of the clock of this machine by more than the documentation allows.
    ClockBehind { side: usize },
    /// The wires of this process stall, break or are half-open.
    Wire { side: usize },
    /// A wire is gone, and another one is made: "If that message does not come back in time, the proxy closes
    /// the connection".
    Reconnects { side: usize },
    /// The process stands still.
    Stopped { side: usize },
    /// Its machine is suspended.
    Suspended { side: usize },
    /// The process is gone for good.
    Killed { side: usize },
    /// It drains.
    Draining { side: usize },
}

impl Trouble {
    /// The process that it concerns. `None`: all of them.
    pub fn side(self) -> Option<usize> {
        match self {
            Self::ClockOff { side }
            | Self::ClockBehind { side }
            | Self::Wire { side }
            | Self::Reconnects { side }
            | Self::Stopped { side }
            | Self::Suspended { side }
            | Self::Killed { side }
            | Self::Draining { side } => Some(side),
            Self::LeaderAway
            | Self::Restarted
            | Self::MadeAgain
            | Self::Absent
            | Self::Reset
            | Self::Configured
            | Self::Paused
            | Self::Poisoned
            | Self::KeyRemoved
            | Self::KeyAtFront
            | Self::Refused
            | Self::Denied => None,
        }
    }

    /// The name of its kind, for counts.
    pub fn kind(self) -> &'static str {
        match self {
            Self::LeaderAway => "leader away",
            Self::Restarted => "restart",
            Self::MadeAgain => "made again",
            Self::Absent => "absent",
            Self::Reset => "reset",
            Self::Configured => "limits changed",
            Self::Paused => "pause",
            Self::Poisoned => "poison",
            Self::KeyRemoved => "keys",
            Self::KeyAtFront => "key at the front",
            Self::Refused => "right refused",
            Self::Denied => "rights denied",
            Self::ClockOff { .. } => "clock",
            Self::ClockBehind { .. } => "clock behind",
            Self::Wire { .. } => "wire",
            Self::Reconnects { .. } => "reconnect",
            Self::Stopped { .. } => "stop",
            Self::Suspended { .. } => "suspension",
            Self::Killed { .. } => "kill",
            Self::Draining { .. } => "drain",
        }
    }

    /// Whether it can keep messages from their way: a wrong clock and new keys cannot.
    fn delays(self) -> bool {
        !matches!(
            self,
            Self::ClockOff { .. } | Self::ClockBehind { .. } | Self::KeyRemoved | Self::KeyAtFront
        )
    }
}

/// One accident in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TroubleSpan {
    pub trouble: Trouble,
    /// `None`: every consumer.
    pub consumer: Option<ConsumerName>,
    pub from: Time,
    pub until: Time,
}

/// All accidents so far. An end may lie in the future.
#[derive(Debug, Clone, Default)]
pub struct Troubles(Vec<TroubleSpan>);

impl Troubles {
    pub fn add(&mut self, span: TroubleSpan) {
        self.0.push(span);
    }

    /// An accident is over sooner than was known.
    pub fn end(&mut self, trouble: Trouble, now: Time) {
        for span in self.0.iter_mut().filter(|span| span.trouble == trouble && span.from <= now) {
            span.until = span.until.min(now);
        }
    }

    /// The time of the world jumps while timers stand still. Accidents that a timer ends last longer.
    pub fn lengthen(&mut self, length: Duration, now: Time) {
        let by_timer = |trouble: Trouble| {
            matches!(
                trouble,
                Trouble::LeaderAway
                    | Trouble::Restarted
                    | Trouble::MadeAgain
                    | Trouble::Absent
                    | Trouble::Stopped { .. }
            )
        };
        for span in &mut self.0 {
            if by_timer(span.trouble) && span.from <= now && now < span.until {
                span.until += length;
            }
        }
    }

    /// The first accident of this kind that concerns a consumer is over.
    pub fn end_first(&mut self, trouble: Trouble, consumer: &ConsumerName, now: Time) {
        let of = |span: &&mut TroubleSpan| {
            span.trouble == trouble && span.consumer.as_ref() == Some(consumer)
        };
        if let Some(first) = self.0.iter_mut().find(of) {
            first.until = first.until.min(now);
        }
    }

    pub fn all(&self) -> &[TroubleSpan] {
        &self.0
    }

    /// The accidents of a consumer that overlap a time, ends included.
    pub fn between<'t>(
        &'t self,
        consumer: &'t ConsumerName,
        from: Time,
        until: Time,
    ) -> impl Iterator<Item = &'t TroubleSpan> {
        self.0.iter().filter(move |span| {
            span.consumer.as_ref().is_none_or(|of| of == consumer)
                && span.from <= until
                && from <= span.until
        })
    }

    /// Whether an accident of this kind overlaps a time.
    pub fn happened(
        &self,
        trouble: Trouble,
        consumer: &ConsumerName,
        from: Time,
        until: Time,
    ) -> bool {
        self.between(consumer, from, until).any(|span| span.trouble == trouble)
    }

    /// The latest end of an accident of this kind that had begun by `now`.
    pub fn last_end(&self, trouble: Trouble, consumer: &ConsumerName, now: Time) -> Option<Time> {
        let of = self.between(consumer, Duration::ZERO, now);
        of.filter(|span| span.trouble == trouble).map(|span| span.until).max()
    }

    /// The latest begin of an accident of this kind.
    pub fn last_begin(&self, trouble: Trouble, consumer: &ConsumerName, now: Time) -> Option<Time> {
        let of = self.between(consumer, Duration::ZERO, now);
        of.filter(|span| span.trouble == trouble && span.from <= now).map(|span| span.from).max()
    }

    /// The end of the last accident after `since` that could delay a message. It concerns all processes, or
    /// one of those that `touches` accepts.
    pub fn calm_at(
        &self,
        consumer: &ConsumerName,
        touches: impl Fn(usize) -> bool,
        since: Time,
        now: Time,
    ) -> Option<Time> {
        let touches = |trouble: Trouble| trouble.delays() && trouble.side().is_none_or(&touches);
        let of = self.between(consumer, since, now).filter(|span| touches(span.trouble));
        of.map(|span| span.until).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(secs: u64) -> Time {
        Duration::from_secs(secs)
    }

    fn name(consumer: &str) -> ConsumerName {
        ConsumerName { stream: "S".into(), consumer: consumer.into() }
    }

    fn troubles() -> Troubles {
        let mut troubles = Troubles::default();
        for (trouble, consumer, from, until) in [
            (Trouble::LeaderAway, Some(name("a")), 10, 12),
            (Trouble::Wire { side: 1 }, None, 20, 25),
            (Trouble::KeyRemoved, None, 26, 90),
        ] {
            let (from, until) = (secs(from), secs(until));
            troubles.add(TroubleSpan { trouble, consumer, from, until });
        }
        troubles
    }

    #[test]
    fn accident_concerns_its_consumer_in_its_time_only() {
        let (troubles, away) = (troubles(), Trouble::LeaderAway);
        assert!(troubles.happened(away, &name("a"), secs(12), secs(13)));
        assert!(!troubles.happened(away, &name("a"), secs(13), secs(14)));
        assert!(!troubles.happened(away, &name("b"), secs(0), secs(99)));
        assert_eq!(troubles.last_end(away, &name("a"), secs(99)), Some(secs(12)));
        assert_eq!(troubles.last_end(away, &name("a"), secs(9)), None);
    }

    #[test]
    fn accident_that_is_over_sooner_excuses_nothing_after_its_end() {
        let (mut troubles, wire) = (troubles(), Trouble::Wire { side: 1 });
        troubles.end(wire, secs(22));
        assert!(troubles.happened(wire, &name("a"), secs(22), secs(23)));
        assert!(!troubles.happened(wire, &name("a"), secs(23), secs(24)));
    }

    #[test]
    fn accident_lasts_longer_by_a_jump_of_the_time_unless_it_is_over() {
        let mut troubles = troubles();
        troubles.lengthen(secs(3), secs(9));
        troubles.lengthen(secs(3), secs(11));
        troubles.lengthen(secs(3), secs(21));
        let ends = |trouble| troubles.last_end(trouble, &name("a"), secs(99));
        assert_eq!(ends(Trouble::LeaderAway), Some(secs(15)));
        assert_eq!(ends(Trouble::Wire { side: 1 }), Some(secs(25)), "no timer ends it");
    }

    #[test]
    fn first_accident_of_a_consumer_ends_alone() {
        let (mut troubles, away) = (troubles(), Trouble::LeaderAway);
        let (consumer, from, until) = (Some(name("a")), secs(11), secs(20));
        troubles.add(TroubleSpan { trouble: away, consumer, from, until });
        troubles.end_first(away, &name("a"), secs(11));
        assert_eq!(troubles.last_end(away, &name("a"), secs(10)), Some(secs(11)));
        assert!(troubles.happened(away, &name("a"), secs(12), secs(13)));
    }

    #[test]
    fn calm_begins_after_the_accidents_that_touch_the_process() {
        let (troubles, a) = (troubles(), name("a"));
        assert_eq!(troubles.calm_at(&a, |side| side == 1, secs(0), secs(30)), Some(secs(25)));
        assert_eq!(troubles.calm_at(&a, |side| side == 0, secs(0), secs(30)), Some(secs(12)));
        assert_eq!(troubles.calm_at(&a, |side| side == 0, secs(13), secs(30)), None);
    }
}
