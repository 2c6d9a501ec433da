//! How leases ended: half a byte for each of the last ids, in a ring that never grows.

use super::{LeaseId, SettleKind};

/// How a lease left the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was settled; a Nak also when nobody knows whether it arrived.
    Settled(SettleKind),
    /// Its holder let its deadline pass, or it was given back.
    Lapsed,
    /// JetStream may have given it away.
    Lost,
    /// Its message arrived anew while this settlement of it was under way, so how it ended is not
    /// known before that is.
    Overtaken(SettleKind),
}

/// Every end that is not "nothing is known", which is 0; its nibble is its place plus one.
const ENDS: [Ended; 8] = [
    Ended::Settled(SettleKind::Ack),
    Ended::Settled(SettleKind::Nak),
    Ended::Settled(SettleKind::Term),
    Ended::Lapsed,
    Ended::Lost,
    Ended::Overtaken(SettleKind::Ack),
    Ended::Overtaken(SettleKind::Nak),
    Ended::Overtaken(SettleKind::Term),
];

/// Remembers the ids after `newest - capacity`.
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

    /// Makes room for a new id; the oldest is forgotten.
    pub(super) fn extend_to(&mut self, id: LeaseId) {
        self.newest = id.get();
        self.write(id, 0);
    }

    /// Notes how a lease ended. One that was held for longer than the memory is deep is forgotten
    /// as it ends.
    pub(super) fn remember(&mut self, id: LeaseId, ended: Ended) {
        if self.covers(id) {
            self.write(id, ended.nibble());
        }
    }

    /// How it ended. `None` if it has not, or that is forgotten, or there is no such lease.
    pub(super) fn ended(&self, id: LeaseId) -> Option<Ended> {
        let (place, shift) = self.place(id);
        let nibble = self.nibbles.get(place).filter(|_| self.covers(id))? >> shift & 0xf;
        of_nibble(nibble)
    }

    /// The oldest id that is remembered. `None`: there is none yet.
    pub(super) fn oldest(&self) -> Option<LeaseId> {
        let oldest = self.newest.saturating_sub(self.capacity - 1).max(1);
        LeaseId::new(oldest).filter(|oldest| oldest.get() <= self.newest)
    }

    fn covers(&self, id: LeaseId) -> bool {
        id.get() <= self.newest && self.newest - id.get() < self.capacity
    }

    fn write(&mut self, id: LeaseId, nibble: u8) {
        let (place, shift) = self.place(id);
        if let Some(byte) = self.nibbles.get_mut(place) {
            *byte = *byte & !(0xf << shift) | nibble << shift;
        }
    }

    fn place(&self, id: LeaseId) -> (usize, u32) {
        let place = id.get() % self.capacity;
        // Below the length of the ring, so it fits.
        (
            usize::try_from(place / 2).unwrap_or(usize::MAX),
            if place.is_multiple_of(2) { 0 } else { 4 },
        )
    }
}

/// The end that this half byte stands for, if it stands for one.
pub(super) fn of_nibble(nibble: u8) -> Option<Ended> {
    ENDS.get(usize::from(nibble.checked_sub(1)?)).copied()
}

impl Ended {
    pub(super) fn nibble(self) -> u8 {
        let place = ENDS.iter().position(|end| *end == self);
        // All are listed, and there are eight; the test below counts them.
        place.and_then(|place| u8::try_from(place + 1).ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> LeaseId {
        LeaseId::new(number).unwrap()
    }

    #[test]
    fn every_end_is_told_from_every_other() {
        let mut memory = OutcomeRing::new(ENDS.len());
        for (number, end) in (1..).zip(ENDS) {
            memory.extend_to(id(number));
            memory.remember(id(number), end);
        }
        for (number, end) in (1..).zip(ENDS) {
            assert_eq!(memory.ended(id(number)), Some(end));
        }
    }

    #[test]
    fn the_last_ones_are_remembered_and_older_ones_forgotten() {
        let mut memory = OutcomeRing::new(4);
        let end = |number| {
            Ended::Settled(if number % 2 == 0 { SettleKind::Term } else { SettleKind::Ack })
        };
        for number in 1..=6 {
            memory.extend_to(id(number));
            memory.remember(id(number), end(number));
        }
        for number in 1..=2 {
            assert_eq!(memory.ended(id(number)), None);
        }
        for number in 3..=6 {
            assert_eq!(memory.ended(id(number)), Some(end(number)));
        }
        assert_eq!(memory.ended(id(7)), None, "never granted");
    }

    #[test]
    fn what_is_still_held_has_not_ended_and_what_ends_too_late_is_forgotten() {
        let mut memory = OutcomeRing::new(2);
        memory.extend_to(id(1));
        assert_eq!(memory.ended(id(1)), None);
        memory.extend_to(id(2));
        memory.extend_to(id(3));
        memory.remember(id(1), Ended::Lapsed);
        assert_eq!((memory.ended(id(1)), memory.ended(id(3))), (None, None));
    }
}
