//! The network between clients and replicas: who cannot reach whom, and which calls are open. Aborts the calls
//! that a real wire would abort.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use tokio::task::AbortHandle;

use super::jetstream::Time;

/// A silent connection is given up after so long, by both ends: 10 s until the question, 5 s for its answer.
pub const KEEPALIVE: Duration = Duration::from_secs(15);

#[derive(Default)]
pub struct Roads(Mutex<Ways>);

#[derive(Default)]
struct Ways {
    serial: u64,
    /// Until when a client and a replica cannot reach each other, by number and place.
    parted: BTreeMap<(u64, usize), Time>,
    calls: BTreeMap<u64, OpenCall>,
}

struct OpenCall {
    client: u64,
    /// The replica's place, and which of its processes it was.
    place: usize,
    side: usize,
    began: Time,
    task: AbortHandle,
}

impl Roads {
    pub fn part(&self, client: u64, place: usize, until: Time) {
        let mut ways = self.0.lock().unwrap();
        let last = ways.parted.entry((client, place)).or_default();
        *last = (*last).max(until);
    }

    /// Until when they cannot reach each other.
    pub fn parted(&self, client: u64, place: usize, now: Time) -> Option<Time> {
        let until = self.0.lock().unwrap().parted.get(&(client, place)).copied();
        until.filter(|until| now < *until)
    }

    /// A call is open; returns its number for [`Roads::close`].
    pub fn open(
        &self,
        client: u64,
        (place, side): (usize, usize),
        began: Time,
        task: AbortHandle,
    ) -> u64 {
        let mut ways = self.0.lock().unwrap();
        ways.serial += 1;
        let serial = ways.serial;
        ways.calls.insert(serial, OpenCall { client, place, side, began, task });
        serial
    }

    pub fn close(&self, call: u64) {
        self.0.lock().unwrap().calls.remove(&call);
    }

    /// The replica gives up the connection of a client that has been silent since then.
    pub fn silent(&self, client: u64, place: usize, since: Time) {
        let ways = self.0.lock().unwrap();
        let of =
            |call: &&OpenCall| call.client == client && call.place == place && call.began <= since;
        ways.calls.values().filter(of).for_each(|call| call.task.abort());
    }

    /// A process is gone, and with it each call at its end.
    pub fn gone(&self, side: usize) {
        let ways = self.0.lock().unwrap();
        let of = |call: &&OpenCall| call.side == side;
        ways.calls.values().filter(of).for_each(|call| call.task.abort());
    }
}
