//! The part of a wire that is in the process of the replica: messages that the client library has, and has
//! not given to the kernel yet. Pure.
//!
//! 1. While a lane is stalled, the kernel takes some frames more, and then the library keeps the rest.
//! 2. The proxy flushes the library after every [`MAX_UNFLUSHED`] messages, so at most this number waits.
//! 3. A process that is stopped and continues writes what its library has, however late that is.

use testkit::dice::Dice;

use super::carried::Up;

/// The same number as in `src/nats/request_mux.rs`.
pub(super) const MAX_UNFLUSHED: usize = 32;
/// The frames that the kernel takes for a stalled lane: none, a few, or more than anybody sends. In bytes it
/// is a window of TCP and a send buffer.
const KERNEL: [usize; 4] = [0, 2, 16, usize::MAX];

#[derive(Default)]
pub(super) struct Library {
    waits: Vec<Up>,
    /// The frames that the kernel still takes while its lane is stalled.
    room: usize,
    /// Messages since the last flush.
    unflushed: usize,
}

impl Library {
    /// A stall begins.
    pub(super) fn stalled(&mut self, dice: &mut Dice) {
        self.room = KERNEL[dice.within(0..KERNEL.len() as u64) as usize];
    }

    /// Takes a frame, and returns it if the kernel takes it at once.
    pub(super) fn take(&mut self, what: Up, stalled: bool) -> Option<Up> {
        if !self.waits.is_empty() || stalled && self.room == 0 {
            self.waits.push(what);
            return None;
        }
        if stalled {
            self.room -= 1;
        }
        Some(what)
    }

    /// Puts frames back that a stopped process had not written yet. They are the newest.
    pub(super) fn put_back(&mut self, frames: impl IntoIterator<Item = Up>) {
        self.waits.extend(frames);
    }

    pub(super) fn waiting(&mut self) -> Vec<Up> {
        std::mem::take(&mut self.waits)
    }

    /// Takes a place for a message, if there is one or a flush makes room.
    pub(super) fn take_place(&mut self) -> bool {
        // A flush ends when the kernel has everything.
        if self.unflushed == MAX_UNFLUSHED && self.waits.is_empty() {
            self.unflushed = 0;
        }
        let free = self.unflushed < MAX_UNFLUSHED;
        self.unflushed += usize::from(free);
        free
    }
}
