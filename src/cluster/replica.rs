//! This replica: its leases, the names that it answers for, and its means to talk to the others. The
//! other files of this room share it. Decides nothing.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    sync::SetOnce,
    time::{sleep, timeout_at},
};

use super::{
    channel::{Channel, Topic, Unanswered},
    ownership::SharedOwnership,
    peers::{OwnStatus, Peers},
    untold::RecentSightings,
};
use crate::{broker::Broker, bus::Bus, clock, keys::Keys, lessor::Lessor, token::InstanceId};

/// A new replica has heard of all others after this: they answer its first heartbeat with one of
/// theirs.
const ANNOUNCE_TIME: Duration = Duration::from_millis(250);
/// The waits before a request is sent again, if no replica has received it. An owner between two NATS
/// servers has no subscription for a moment, as was seen in 12 of 20 such moves.
const NOBODY_RETRIES: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(700)];

pub(super) struct Replica<B: Broker + Bus> {
    pub(super) us: InstanceId,
    pub(super) lessor: Lessor<B>,
    pub(super) keys: Arc<Keys>,
    pub(super) channel: Channel<B>,
    pub(super) peers: Peers,
    pub(super) ownership: SharedOwnership,
    /// What this replica has told the others lately.
    pub(super) recent: Mutex<RecentSightings>,
    /// This replica and the others know of each other.
    met: SetOnce<()>,
}

impl<B: Broker + Bus> Replica<B> {
    /// A replica of this cluster that answers for its own name; `name` tells people where it runs.
    pub(super) fn new(
        lessor: Lessor<B>,
        keys: Arc<Keys>,
        cluster: &str,
        (us, name): (InstanceId, &str),
    ) -> Self {
        Self {
            us,
            channel: Channel::new(lessor.clone(), keys.clone(), cluster),
            peers: Peers::new(us, name, keys.clone()),
            ownership: SharedOwnership::new(us),
            recent: Mutex::default(),
            met: SetOnce::new(),
            lessor,
            keys,
        }
    }

    /// Makes itself known to the others, and waits until they have made themselves known.
    pub(super) async fn announce(&self) {
        // Before that it has to listen.
        sleep(ANNOUNCE_TIME / 5).await;
        self.send_heartbeat().await;
        sleep(ANNOUNCE_TIME).await;
        let _ = self.met.set(());
    }

    /// The replicas that may hold leases, for news that each of them must hear. A replica that has just started waits
    /// until it knows them, but not longer than `until`.
    pub(super) async fn others(&self, until: Instant) -> Vec<InstanceId> {
        let _ = timeout_at(until.into(), self.met.wait()).await;
        self.peers.may_hold_leases()
    }

    pub(super) async fn send_heartbeat(&self) {
        let own = OwnStatus {
            names: self.ownership.lock().answered(),
            room: self.lessor.room(),
            draining: self.lessor.is_draining(),
            counts: [self.lessor.held(), self.lessor.waiting(), self.lessor.consumers()]
                .map(|count| count as u64),
        };
        let heartbeat = self.peers.heartbeat(&self.channel.heartbeat_subject(), own);
        if let Some(heartbeat) = heartbeat {
            self.channel.publish_heartbeat(heartbeat).await;
        }
    }

    /// Listens to what is for this replica, and for the names that it answers for.
    pub(super) fn listen(&self) {
        let names = self.ownership.lock().listened();
        self.channel.listen(self.us, names);
    }

    /// Asks the replica that answers for `owner` to settle. If no replica receives the request, it is
    /// sent again, as long as a replica may answer for that name.
    ///
    /// # Errors
    /// See [`Unanswered`].
    pub(super) async fn ask_to_settle(
        &self,
        owner: InstanceId,
        request: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        let mut retries = NOBODY_RETRIES.into_iter();
        loop {
            match self.channel.ask(owner, Topic::Settle, request, until).await {
                Err(Unanswered::Nobody) => {}
                answer => return answer,
            }
            match retries.next() {
                Some(wait) if clock::now() + wait < until && self.peers.may_answer(owner) => {
                    sleep(wait).await;
                }
                Some(_) | None => return Err(Unanswered::Nobody),
            }
        }
    }

    /// Forgets what has had its time: lost replicas, and names without a living lease.
    pub(super) fn forget_old(&self, now: Instant) {
        self.peers.forget_lost(now);
        let mut names = self.ownership.lock();
        for (_, leases) in names.adopted() {
            if !leases.adopted().any(|(_, here)| self.lessor.is_held(here)) {
                self.lessor.record_ends(leases);
            }
        }
        let pruned = names.prune(now);
        drop(names);
        if pruned {
            self.listen();
        }
    }
}
