//! The ends of past leases: half a byte for each of the last ids, in a ring that never grows.

use super::{LeaseId, SettleKind};

/// The way in which a lease left the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was settled.
    Settled(SettleKind),
    /// Its deadline passed, or it was given back.
    Lapsed,
    /// JetStream may have given the message away.
    Lost,
    /// Its consumer is gone.
    Gone,
    /// Its message arrived again while this settlement was running. The outcome of the settlement will
    /// replace this end.
    Overtaken(SettleKind),
}

/// All ends. The nibble of an end is its index plus one, and 0 means "unknown".
const ENDS: [Ended; 9] = [
    Ended::Settled(SettleKind::Ack),
    Ended::Settled(SettleKind::Nak),
    Ended::Settled(SettleKind::Term),
    Ended::Lapsed,
    Ended::Lost,
    Ended::Overtaken(SettleKind::Ack),
    Ended::Overtaken(SettleKind::Nak),
    Ended::Overtaken(SettleKind::Term),
    Ended::Gone,
];

/// The ends of the ids after `newest - capacity`.
#[derive(Debug)]
pub(super) struct OutcomeRing {
    nibbles: Vec<u8>,
    capacity: u64,
    newest: u64,
}

impl OutcomeRing {
    /// Room for `capacity` ids, rounded up to whole bytes.
    pub(super) fn new(capacity: usize) -> Self {
        let bytes = capacity.div_ceil(2).max(1);
        Self { nibbles: vec![0; bytes], capacity: bytes as u64 * 2, newest: 0 }
    }

    /// Makes room for a new id, and forgets the oldest.
    pub(super) fn extend_to(&mut self, id: LeaseId) {
        self.newest = id.get();
        self.write(id, 0);
    }

    /// Notes the end of a lease. If the ring no longer covers the id, the end is forgotten at once.
    pub(super) fn remember(&mut self, id: LeaseId, ended: Ended) {
        if self.covers(id) {
            self.write(id, ended.nibble());
        }
    }

    /// The end of a lease. `None`: it has not ended, its end is forgotten, or there is no such lease.
    pub(super) fn ended(&self, id: LeaseId) -> Option<Ended> {
        let (index, shift) = self.position(id);
        let nibble = self.nibbles.get(index).filter(|_| self.covers(id))? >> shift & 0xf;
        of_nibble(nibble)
    }

    /// The oldest id that the ring covers. `None`: there was no lease yet.
    pub(super) fn oldest(&self) -> Option<LeaseId> {
        let oldest = self.newest.saturating_sub(self.capacity - 1).max(1);
        LeaseId::new(oldest).filter(|oldest| oldest.get() <= self.newest)
    }

    fn covers(&self, id: LeaseId) -> bool {
        id.get() <= self.newest && self.newest - id.get() < self.capacity
    }

    fn write(&mut self, id: LeaseId, nibble: u8) {
        let (index, shift) = self.position(id);
        if let Some(byte) = self.nibbles.get_mut(index) {
            *byte = *byte & !(0xf << shift) | nibble << shift;
        }
    }

    /// The index of the byte, and the shift of the nibble in it.
    fn position(&self, id: LeaseId) -> (usize, u32) {
        let slot = id.get() % self.capacity;
        // Smaller than the length of the ring, so it fits.
        (
            usize::try_from(slot / 2).unwrap_or(usize::MAX),
            if slot.is_multiple_of(2) { 0 } else { 4 },
        )
    }
}

/// The end for this half byte. `None`: the end is unknown.
pub(super) fn of_nibble(nibble: u8) -> Option<Ended> {
    ENDS.get(usize::from(nibble.checked_sub(1)?)).copied()
}

impl Ended {
    pub(super) fn nibble(self) -> u8 {
        let index = ENDS.iter().position(|end| *end == self);
        // All ends are listed. A test below checks that.
        index.and_then(|index| u8::try_from(index + 1).ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> LeaseId {
        LeaseId::new(number).unwrap()
    }

    #[test]
    fn every_end_differs_from_every_other() {
        let mut ring = OutcomeRing::new(ENDS.len());
        for (number, end) in (1..).zip(ENDS) {
            ring.extend_to(id(number));
            ring.remember(id(number), end);
        }
        for (number, end) in (1..).zip(ENDS) {
            assert_eq!(ring.ended(id(number)), Some(end));
        }
    }

    #[test]
    fn the_last_ends_are_remembered_and_older_ends_forgotten() {
        let mut ring = OutcomeRing::new(4);
        let end = |number| {
            Ended::Settled(if number % 2 == 0 { SettleKind::Term } else { SettleKind::Ack })
        };
        for number in 1..=6 {
            ring.extend_to(id(number));
            ring.remember(id(number), end(number));
        }
        for number in 1..=2 {
            assert_eq!(ring.ended(id(number)), None);
        }
        for number in 3..=6 {
            assert_eq!(ring.ended(id(number)), Some(end(number)));
        }
        assert_eq!(ring.ended(id(7)), None, "never granted");
    }

    #[test]
    fn a_held_lease_has_no_end_and_a_late_end_is_forgotten() {
        let mut ring = OutcomeRing::new(2);
        ring.extend_to(id(1));
        assert_eq!(ring.ended(id(1)), None);
        ring.extend_to(id(2));
        ring.extend_to(id(3));
        ring.remember(id(1), Ended::Lapsed);
        assert_eq!((ring.ended(id(1)), ring.ended(id(3))), (None, None));
    }
}
