//! How leases ended: half a byte for each of the last ids, in a ring that never grows.

use super::{Kind, LeaseId};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Ended {
    Ack = 1,
    Nak = 2,
    Term = 3,
    Lapsed = 4,
    Lost = 5,
}

impl Ended {
    pub(super) fn settled(kind: Kind) -> Self {
        match kind {
            Kind::Ack => Self::Ack,
            Kind::Nak => Self::Nak,
            Kind::Term => Self::Term,
        }
    }
}

/// Remembers the ids after `newest - capacity`.
#[derive(Debug)]
pub(super) struct Memory {
    nibbles: Vec<u8>,
    capacity: u64,
    newest: u64,
}

impl Memory {
    pub(super) fn new(capacity: usize) -> Self {
        let bytes = capacity.div_ceil(2).max(1);
        Self { nibbles: vec![0; bytes], capacity: bytes as u64 * 2, newest: 0 }
    }

    /// Makes room for a new id; the oldest is forgotten.
    pub(super) fn extend_to(&mut self, id: LeaseId) {
        self.newest = id.get();
        self.write(id, 0);
    }

    pub(super) fn remember(&mut self, id: LeaseId, ended: Ended) {
        // A lease held for longer than the memory is deep is forgotten as it ends.
        if self.covers(id) {
            self.write(id, ended as u8);
        }
    }

    pub(super) fn ended(&self, id: LeaseId) -> Option<Ended> {
        let (place, shift) = self.place(id);
        match (self.nibbles.get(place)? >> shift) & 0xf {
            _ if !self.covers(id) => None,
            1 => Some(Ended::Ack),
            2 => Some(Ended::Nak),
            3 => Some(Ended::Term),
            4 => Some(Ended::Lapsed),
            5 => Some(Ended::Lost),
            _ => None,
        }
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
        (usize::try_from(place / 2).unwrap_or(usize::MAX), if place % 2 == 0 { 0 } else { 4 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> LeaseId {
        LeaseId::new(number).unwrap()
    }

    #[test]
    fn the_last_ones_are_remembered_and_older_ones_forgotten() {
        let mut memory = Memory::new(4);
        for number in 1..=6 {
            memory.extend_to(id(number));
            memory.remember(id(number), if number % 2 == 0 { Ended::Term } else { Ended::Ack });
        }
        assert_eq!([1, 2].map(|number| memory.ended(id(number))), [None, None]);
        let known = [3, 4, 5, 6].map(|number| memory.ended(id(number)).unwrap());
        assert_eq!(known, [Ended::Ack, Ended::Term, Ended::Ack, Ended::Term]);
        assert_eq!(memory.ended(id(7)), None);
    }

    #[test]
    fn what_is_still_held_has_not_ended_and_what_ends_too_late_is_forgotten() {
        let mut memory = Memory::new(2);
        memory.extend_to(id(1));
        assert_eq!(memory.ended(id(1)), None);
        memory.extend_to(id(2));
        memory.extend_to(id(3));
        memory.remember(id(1), Ended::Ack);
        assert_eq!((memory.ended(id(1)), memory.ended(id(3))), (None, None));
    }
}
