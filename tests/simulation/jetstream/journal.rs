//! The changes of a consumer's state that its leader has written, and that may still be lost. A consumer
//! without copies loses them with a crash, until they are on the disk. A consumer with copies loses them
//! with its leader, until a majority has them.

use std::{collections::VecDeque, time::Duration};

use super::{
    state::{Entry, State},
    types::Time,
};

/// The longest time until a change is permanent, if all servers are there. A server writes its disk at
/// most every 100 ms (filestore.go:13540), and a majority has the newest changes a moment later.
pub const LONGEST_FORGOTTEN: Duration = Duration::from_millis(250);

pub struct Journal {
    /// The state that cannot be lost.
    safe: State,
    entries: VecDeque<(Time, Entry)>,
}

impl Journal {
    pub fn new(state: State) -> Self {
        Self { safe: state, entries: VecDeque::new() }
    }

    pub fn write(&mut self, entry: Entry, now: Time) {
        self.entries.push_back((now, entry));
    }

    /// Changes up to this time are permanent.
    pub fn keep(&mut self, until: Time) {
        while let Some((_, entry)) = self.entries.pop_front_if(|(at, _)| *at <= until) {
            self.safe.record(&entry);
        }
    }

    /// A majority has all changes up to this time that somebody outside was answered about, and with them
    /// everything before. Progress and delayed Naks are answered before (consumer.go:2870).
    pub fn keep_answered(&mut self, until: Time) {
        let answered =
            |(at, entry): &(Time, Entry)| *at <= until && !matches!(entry, Entry::Moved { .. });
        if let Some(last) = self.entries.iter().rposition(answered) {
            for (_, entry) in self.entries.drain(..=last) {
                self.safe.record(&entry);
            }
        }
    }

    /// The state is read from the disk, where it was written at this time. Starts of ack clocks are stored in
    /// whole seconds of the server's clock (store.go:521), so messages come back up to a second early.
    pub fn read_from_disk(&mut self, written: Time, clock: Duration) {
        self.safe = self.recover(written);
        for pending in self.safe.pending.values_mut() {
            let seconds = (clock + pending.began).as_secs();
            pending.began = Duration::from_secs(seconds).saturating_sub(clock);
        }
    }

    /// The state that is left after the loss of everything newer than this time.
    pub fn recover(&mut self, until: Time) -> State {
        self.keep(until);
        self.entries.clear();
        self.safe.clone()
    }
}
