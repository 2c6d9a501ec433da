//! The attempts of this replica behind their lock, and the guards of their calls. A call that is dropped before it
//! has an answer is forgotten. So is an answer that goes back without being written.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use ring::digest::{Context, SHA256};
use tokio::sync::oneshot;

use super::{
    attempts::{AttemptKey, AttemptLimits, Attempts, Begun, CallNo, FoundAttempt, ReturnedAttempt},
    delivery::AnswerEnd,
};
use crate::{broker::ConsumerName, clock, lease::LeaseId, lock::lock};

/// Attempts that are remembered, at about 100 bytes each. With 200 calls in a second, it is the window.
const MAX_ATTEMPTS: usize = 65_536;
/// How long an attempt is remembered after its first answer.
const ATTEMPT_WINDOW: Duration = Duration::from_secs(300);

type Known = Attempts<oneshot::Sender<()>, AnswerEnd>;

impl AttemptKey {
    /// The key of an attempt of this principal. Nobody finds two attempts with the same key.
    pub fn new(principal: &str, name: &ConsumerName, attempt: &str) -> Self {
        let mut digest = Context::new(&SHA256);
        for part in [principal, &name.stream, &name.consumer, attempt] {
            digest.update(&(part.len() as u64).to_be_bytes());
            digest.update(part.as_bytes());
        }
        let mut key = [0; 16];
        key.copy_from_slice(&digest.finish().as_ref()[..16]);
        Self(key)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct SharedAttempts(Mutex<Known>);

/// The answer to the first question of a call with an attempt.
#[derive(Debug)]
pub enum AttemptBegun {
    /// Nothing of the attempt is known here. The call waits in its place.
    Waits(AttemptCall),
    /// The attempt has messages here.
    Again(LentAttempt),
    /// The attempt is over.
    Over,
}

/// What is known here of an attempt whose call has come to another replica.
#[derive(Debug)]
pub enum AttemptFound {
    /// A call waited here, and is over. It has leased nothing.
    Waited,
    /// The attempt has messages here.
    Again(LentAttempt),
    /// The attempt is over.
    Over,
}

/// A call that waits in the place of its attempt.
#[derive(Debug)]
pub struct AttemptCall {
    attempts: Arc<SharedAttempts>,
    pub(super) key: AttemptKey,
    call: CallNo,
    over: oneshot::Receiver<()>,
    armed: bool,
}

/// The leases of an attempt that is repeated.
#[derive(Debug)]
pub struct LentAttempt {
    pub(super) key: AttemptKey,
    pub(super) leases: Box<[LeaseId]>,
}

/// The first answer of an attempt, on its way.
#[derive(Debug)]
pub(super) struct FirstAnswer {
    attempts: Arc<SharedAttempts>,
    key: AttemptKey,
    call: CallNo,
}

impl SharedAttempts {
    pub(super) fn new(max_leases: usize) -> Self {
        let limits =
            AttemptLimits { attempts: MAX_ATTEMPTS, leases: max_leases, window: ATTEMPT_WINDOW };
        Self(Mutex::new(Attempts::new(limits)))
    }

    /// A call of this attempt begins; `again`: it is a repeat.
    pub(super) fn begin(self: &Arc<Self>, key: AttemptKey, again: bool) -> AttemptBegun {
        let (tell, over) = oneshot::channel();
        match lock(&self.0).begin((key, again), tell, returned, clock::now()) {
            Begun::Over => AttemptBegun::Over,
            Begun::Again(leases) => AttemptBegun::Again(LentAttempt { key, leases }),
            Begun::Waits(call, older) => {
                // The older call may just have ended.
                older.map(|older| older.send(()));
                let attempts = self.clone();
                AttemptBegun::Waits(AttemptCall { attempts, key, call, over, armed: true })
            }
        }
    }

    /// The answer of an attempt has arrived at its caller, or none of its leases is left.
    pub(super) fn arrived(&self, key: AttemptKey) {
        lock(&self.0).arrived(key);
    }

    /// What is known here of an attempt whose call has come to another replica. `None`: nothing.
    pub(super) fn find(&self, key: AttemptKey) -> Option<AttemptFound> {
        Some(match lock(&self.0).find(key, returned, clock::now()) {
            FoundAttempt::Unknown => return None,
            FoundAttempt::Over => AttemptFound::Over,
            FoundAttempt::Again(leases) => AttemptFound::Again(LentAttempt { key, leases }),
            FoundAttempt::Waited(waiting) => {
                // It may just have ended.
                let _ = waiting.send(());
                AttemptFound::Waited
            }
        })
    }

    /// The attempt is over, and its call that waits is told. Returns the leases to give back. `None`: nothing was known
    /// of it.
    pub(super) fn give_back(&self, key: AttemptKey) -> Option<Box<[LeaseId]>> {
        let back = lock(&self.0).give_back(key, returned, clock::now());
        let ReturnedAttempt { known, waiting, leases } = back;
        waiting.map(|waiting| waiting.send(()));
        known.then_some(leases)
    }
}

impl AttemptCall {
    /// Waits until another call, or a give-back, ends this call.
    pub(super) async fn over(&mut self) {
        // The other side of a call that is forgotten is dropped with the call itself.
        let _ = (&mut self.over).await;
    }

    /// The call gets these leases. `None`: it is over, and has no leases.
    pub(super) fn lend(mut self, leases: Box<[LeaseId]>, end: &AnswerEnd) -> Option<FirstAnswer> {
        let (attempts, key, call) = (self.attempts.clone(), self.key, self.call);
        let lent = lock(&attempts.0).lend(key, call, leases, end.clone(), clock::now());
        self.armed = !lent;
        lent.then_some(FirstAnswer { attempts, key, call })
    }
}

impl Drop for AttemptCall {
    fn drop(&mut self) {
        if self.armed {
            lock(&self.attempts.0).forget(self.key, self.call);
        }
    }
}

impl FirstAnswer {
    /// The answer goes back without being written.
    pub(super) fn forget(self) {
        lock(&self.attempts.0).forget(self.key, self.call);
    }
}

/// Whether an answer went back without being written. If it is neither written nor back, it does not go back any
/// more: a later call of its attempt has its messages.
fn returned(end: &AnswerEnd) -> bool {
    end.set(false).is_err() && end.get() == Some(&false)
}
