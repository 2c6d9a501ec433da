//! Signs: moments of a run that no plan can name by their time. Accidents are aimed at them, and nervous
//! clients act on them.

use std::{collections::BTreeMap, sync::Mutex};

use tokio::sync::Notify;

use super::jetstream::Time;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sign {
    /// A client has a message.
    Fetched,
    /// The lease of that message ends. It is known when the message is there.
    LeaseEnds,
    /// A client is about to settle something.
    Settling,
    Draining,
    /// A replica that drains is about to hand over its leases.
    HandingOver,
    /// A consumer has another leader, or its server is back.
    Leader,
    /// A consumer was reset, or made again.
    MadeAgain,
    Killed,
}

/// A moment, and the place of the replica that it is of, if there is one.
pub type Moment = (Time, Option<usize>);

#[derive(Default)]
pub struct Signs {
    seen: Mutex<BTreeMap<Sign, Vec<Moment>>>,
    given: Notify,
    accident: Notify,
    message: Notify,
}

impl Signs {
    pub fn give(&self, sign: Sign, moment: Moment) {
        self.seen.lock().unwrap().entry(sign).or_default().push(moment);
        self.given.notify_waiters();
    }

    /// Waits for the first sign from a time on. A sign may be known before its time.
    pub async fn next(&self, sign: Sign, from: Time) -> Moment {
        loop {
            let given = self.given.notified();
            let first = {
                let seen = self.seen.lock().unwrap();
                let later = seen.get(&sign).into_iter().flatten().filter(|(at, _)| *at >= from);
                later.min().copied()
            };
            if let Some(moment) = first {
                return moment;
            }
            given.await;
        }
    }

    pub fn give_accident(&self) {
        self.accident.notify_waiters();
    }

    /// Waits for the next accident that a client can see.
    pub async fn accident(&self) {
        self.accident.notified().await;
    }

    pub fn give_message(&self) {
        self.message.notify_waiters();
    }

    /// Waits for the next message of any stream.
    pub async fn message(&self) {
        self.message.notified().await;
    }
}
