//! The sender of a hand-over: a replica that leaves gives its leases to a replica that stays. That
//! replica answers for the names of the sender from then on. So old tokens continue to work at every
//! replica, and long leases are kept alive.
//!
//! ```text
//!  sender                                            receiver
//!  settlements under way end; clocks stand still
//!     ── Prepare: leases, how others ended ─────────▶ checks the consumers, reserves room
//!     ── Commit: names ─────────────────────────────▶ takes the leases and the names
//!  nothing is its own any more; passes requests on
//! ```
//! 1. Before Commit, the receiver shows nothing of the hand-over. It can be given up, and another
//!    receiver tried.
//! 2. Once Commit may have been received, no other receiver is tried. The sender does nothing more with
//!    its leases, whatever the answer says.
//! 3. No clock ends later at the receiver than at the sender.
//! 4. An answer that is being written keeps its leases, which move. If it is not written in the end, the
//!    receiver gives them back.
//! 5. A hand-over ends once and never begins again, whoever repeats its messages.

mod receiver;
mod unwritten;
mod wire;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use tokio::time::{sleep, timeout_at};
use tokio_util::task::TaskTracker;

use self::wire::{STEP_TIMEOUT, TransferParts, micros, millis};
pub(super) use self::{
    receiver::Receiver,
    wire::{read_caller, sent_caller},
};
use super::{
    channel::{Topic, Unanswered, nonce},
    replica::Replica,
};
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    lease::LeaseId,
    pb::peer::v1::{self as pb, handover_request::Step},
    simulated::spawn,
    token::InstanceId,
};

/// At first a receiver has this long to say that it is there. If one of them hangs, the ten seconds of
/// a hand-over must be enough for the others. Silent receivers are asked once more, with the whole
/// [`STEP_TIMEOUT`].
const FIRST_TRY_TIMEOUT: Duration = Duration::from_millis(500);
/// Commit is repeated after this if NATS is away.
const COMMIT_RETRY: Duration = Duration::from_millis(100);
/// How often the sender looks whether settlements without a caller have ended.
const SETTLING_POLL: Duration = Duration::from_millis(5);

/// How a hand-over to one receiver ended.
enum TransferResult {
    /// The receiver has taken this many leases.
    Taken(u64),
    /// The receiver has not taken the leases, and will not.
    Refused(String),
    /// Some of the leases have ended meanwhile, and nothing was taken.
    Outdated,
    /// The receiver did not say that it is there. Nothing has begun.
    Absent(String),
    /// Nobody knows.
    Unknown,
}

/// Everything that is handed over.
struct Transfer {
    /// The clocks of the leases are as they were at this time, or later.
    at: Instant,
    /// The names, and how long each has had no living lease.
    names: Vec<(InstanceId, Duration)>,
    /// The leases and outcomes, in the pieces that a NATS message can carry.
    parts: Vec<pb::Prepare>,
    /// The leases of this replica that are among them.
    leases: Vec<LeaseId>,
}

/// The identifier of one hand-over: 8 random bytes.
type HandoverId<'n> = &'n [u8];

/// The sender's side.
pub(super) struct Sender<'r, B: Broker + Bus> {
    replica: &'r Arc<Replica<B>>,
    tasks: &'r TaskTracker,
}

impl<'r, B: Broker + Bus> Sender<'r, B> {
    /// A sender. What it leaves to do after the hand-over is a task among `tasks`.
    pub(super) fn new(replica: &'r Arc<Replica<B>>, tasks: &'r TaskTracker) -> Self {
        Self { replica, tasks }
    }

    /// Hands everything to a replica that stays. Tries each such replica until `until`. `true`: no lease
    /// is left here. `false`: no replica takes the leases, and they stay here.
    pub(super) async fn hand_over(&self, until: Instant) -> bool {
        // From this heartbeat on, no other replica chooses this one as its receiver.
        self.replica.send_heartbeat().await;
        let (mut tried, mut absent, mut patience) = (Vec::new(), Vec::new(), FIRST_TRY_TIMEOUT);
        while clock::now() < until {
            let Some(receiver) = self.choose_receiver(&tried) else {
                if absent.is_empty() || patience == STEP_TIMEOUT {
                    return false;
                }
                tried.retain(|receiver| !absent.contains(receiver));
                patience = STEP_TIMEOUT;
                continue;
            };
            tried.push(receiver);
            let Ok(nonce) = nonce() else { return false };
            let handover = &nonce[..8];
            match self.try_receiver(receiver, handover, patience, until).await {
                TransferResult::Taken(taken) => {
                    tracing::info!(%receiver, taken, "leases handed over");
                }
                TransferResult::Absent(why) => {
                    tracing::info!(
                        %receiver,
                        why,
                        "a replica does not say whether it takes leases over"
                    );
                    absent.push(receiver);
                    continue;
                }
                TransferResult::Outdated => {
                    self.abort(receiver, handover).await;
                    // The next try is without these leases.
                    tried.pop();
                    continue;
                }
                TransferResult::Refused(why) => {
                    tracing::warn!(%receiver, why, "a replica did not take the leases over");
                    self.abort(receiver, handover).await;
                    continue;
                }
                TransferResult::Unknown => {
                    tracing::warn!(
                        %receiver,
                        "no answer to the hand-over: the leases are left to that replica"
                    );
                }
            }
            self.replica.send_heartbeat().await;
            return true;
        }
        false
    }

    async fn try_receiver(
        &self,
        receiver: InstanceId,
        handover: HandoverId<'_>,
        patience: Duration,
        until: Instant,
    ) -> TransferResult {
        // Is it there? There is no time to find out while the clocks stand still.
        let nothing = Step::Prepare(pb::Prepare::default());
        let patience = until.min(clock::now() + patience);
        match self.step(receiver, handover, nothing, patience).await {
            Ok(answer) if answer.done => {}
            Ok(answer) => return TransferResult::Refused(answer.why),
            Err(why) => return TransferResult::Absent(format!("{why:?}")),
        }
        let Replica { lessor, ownership, .. } = &**self.replica;
        // Settlements under way hold the gate. No other begins before it is open again.
        let gate = timeout_at(until.into(), async {
            let gate = ownership.close_gate().await;
            // Settlements without a caller do not hold the gate, and are still under way.
            while lessor.is_settling() {
                sleep(SETTLING_POLL).await;
            }
            gate
        });
        let Ok(_gate) = gate.await else {
            return TransferResult::Refused("settlements are still under way".to_owned());
        };
        lessor.freeze();
        let transfer = self.transfer();
        let leases = transfer.leases.clone();
        let result = self.send(transfer, receiver, handover, until).await;
        if matches!(result, TransferResult::Taken(_) | TransferResult::Unknown) {
            ownership.lock().hand_over(receiver, clock::now());
            let unwritten = lessor.forget_moved(&leases);
            if !unwritten.is_empty() {
                let replica = self.replica.clone();
                spawn(self.tasks, async move {
                    unwritten::give_back(&replica, receiver, unwritten).await;
                });
            }
        }
        lessor.thaw();
        result
    }

    /// The replica with the most room among those that stay, if its room is enough.
    fn choose_receiver(&self, tried: &[InstanceId]) -> Option<InstanceId> {
        let (receiver, room) = self.replica.peers.most_room(tried)?;
        let leases = self.replica.lessor.held();
        if room < leases as u64 {
            tracing::info!(leases, "no replica that stays has room for the leases");
            return None;
        }
        Some(receiver)
    }

    async fn send(
        &self,
        transfer: Transfer,
        receiver: InstanceId,
        handover: HandoverId<'_>,
        until: Instant,
    ) -> TransferResult {
        let mut under_way = Duration::ZERO;
        for mut part in transfer.parts {
            let sent = clock::now();
            part.age(sent.duration_since(transfer.at));
            let step = Step::Prepare(part);
            let step = self.step(receiver, handover, step, until.min(sent + STEP_TIMEOUT)).await;
            let worked = match step {
                Ok(answer) if answer.done => Duration::from_micros(answer.worked),
                Ok(answer) => return TransferResult::Refused(answer.why),
                Err(why) => return TransferResult::Refused(format!("{why:?}")),
            };
            // The receiver counts from the arrival of the part, and may have to read INFO of its consumers.
            under_way = under_way.max(clock::now().duration_since(sent).saturating_sub(worked));
        }
        // The receiver may have ended its own leases of that consumer before the first part arrived.
        if !self.replica.lessor.pin(&transfer.leases) {
            return TransferResult::Outdated;
        }
        let commit = pb::Commit {
            names: transfer.names.iter().map(|(name, _)| name.0.to_vec().into()).collect(),
            idle: transfer.names.iter().map(|(_, idle)| millis(*idle)).collect(),
            under_way: micros(under_way),
            leases: transfer.leases.len() as u64,
        };
        let mut maybe_received = false;
        loop {
            let now = clock::now();
            let commit = Step::Commit(commit.clone());
            match self.step(receiver, handover, commit, until.min(now + STEP_TIMEOUT)).await {
                Ok(answer) if answer.done => return TransferResult::Taken(answer.taken),
                // The receiver may have committed an earlier try.
                Ok(_) if maybe_received => return TransferResult::Unknown,
                Ok(answer) => return TransferResult::Refused(answer.why),
                Err(Unanswered::Silent) => maybe_received = true,
                Err(Unanswered::Nobody | Unanswered::Unsent) if !maybe_received => {
                    return TransferResult::Refused("it has gone".to_owned());
                }
                Err(Unanswered::Nobody) if !self.replica.peers.is_living(receiver) => {
                    return TransferResult::Unknown;
                }
                Err(Unanswered::Nobody | Unanswered::Unsent) => sleep(COMMIT_RETRY).await,
            }
            if now >= until {
                return TransferResult::Unknown;
            }
        }
    }

    /// The receiver drops what was prepared by now.
    async fn abort(&self, receiver: InstanceId, handover: HandoverId<'_>) {
        let by = clock::now() + STEP_TIMEOUT / 4;
        let _ = self.step(receiver, handover, Step::Abort(pb::Abort {}), by).await;
    }

    async fn step(
        &self,
        receiver: InstanceId,
        handover: HandoverId<'_>,
        step: Step,
        until: Instant,
    ) -> Result<pb::HandoverResponse, Unanswered> {
        let handover = Bytes::copy_from_slice(handover);
        let request = pb::HandoverRequest { handover, step: Some(step) }.encode_to_vec();
        let answer = self.replica.channel.ask(receiver, Topic::Handover, &request, until).await?;
        pb::HandoverResponse::decode(&*answer).map_err(|_| Unanswered::Silent)
    }

    /// Everything that there is to hand over.
    fn transfer(&self) -> Transfer {
        let Replica { us, lessor, ownership, .. } = &**self.replica;
        let at = clock::now();
        // Leases that are known outside by the number of another owner.
        let mut known_as: HashMap<LeaseId, (InstanceId, LeaseId)> = HashMap::new();
        let mut parts = TransferParts::default();
        for piece in lessor.outcomes() {
            parts.memory(*us, &piece);
        }
        let mut names = ownership.lock();
        for (name, adopted) in names.adopted() {
            lessor.record_ends(adopted);
            known_as.extend(adopted.adopted().map(|(there, here)| (here, (name, there))));
            for piece in adopted.outcomes() {
                parts.memory(name, piece);
            }
        }
        let leaving = lessor.leaving();
        let leases = leaving.iter().map(|lease| lease.id).collect();
        for leaving in leaving {
            let (name, id) = known_as.get(&leaving.id).copied().unwrap_or((*us, leaving.id));
            parts.lease(name, id, leaving);
        }
        Transfer { at, names: names.idle(at), parts: parts.done(), leases }
    }
}
