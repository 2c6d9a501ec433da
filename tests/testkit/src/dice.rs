//! The seed: everything that chance decides comes from here, so that a seed gives the same faults
//! and the same intentions again. The scheduler still makes each run different.

use std::{ops::Range, time::Duration};

/// SplitMix64: small, and good enough to choose by.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// The dice of one player: each has a row of its own, whatever the others do.
    pub fn new(seed: u64, player: u64) -> Self {
        let mut dice = Self(seed ^ player.wrapping_mul(0xd134_2543_de82_ef95));
        dice.number();
        dice
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.number() % (range.end - range.start)
    }

    /// True so many times in a hundred.
    pub fn percent(&mut self, share: u64) -> bool {
        self.within(0..100) < share
    }

    pub fn millis(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.within(range))
    }
}
