//! A replica that leaves hands its leases to one that stays, which answers for its names from then
//! on: old tokens go on working everywhere, and long leases are kept alive.
//!
//! ```text
//!  leaver                                            heir
//!  settlements under way end; clocks stand still
//!     ── Prepare: leases, how others ended ─────────▶ checks the consumers, keeps places
//!     ── Commit: names ─────────────────────────────▶ leases are in its table, names are its own
//!  nothing is its own any more; questions are passed on
//! ```
//! 1. before Commit nothing of it is seen at the heir: it may be given up, and another one tried;
//! 2. once Commit may have been heard no other heir is tried, and the leaver does nothing more with
//!    its leases, whatever becomes of the answer;
//! 3. no clock ends later at the heir than at the leaver;
//! 4. a hand-over ends once, and is never begun anew: what was said in it may be said again, by
//!    whomever.

mod receiver;
mod wire;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use tokio::time::{sleep, timeout_at};

pub(super) use self::receiver::Prepared;
use self::wire::{TransferParts, micros, millis};
use super::{HANDOVER_SUBJECT, Peers, Unanswered, nonce};
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    lease::LeaseId,
    pb::peer::v1::{self as pb, handover_request::Step},
    token::InstanceId,
};

/// An heir has this long for one step.
const STEP_TIMEOUT: Duration = Duration::from_secs(2);
/// At first an heir has this long to say that it is there: of ten seconds one that hangs must leave
/// enough for the others. Those that say nothing are asked once more, with all patience.
const FIRST_TRY_TIMEOUT: Duration = Duration::from_millis(500);
/// Commit is repeated after this where NATS is away.
const COMMIT_RETRY: Duration = Duration::from_millis(100);
/// Settlements whose callers have gone are looked at this often.
const SETTLING_POLL: Duration = Duration::from_millis(5);

/// How a hand-over to one heir ended.
enum TransferResult {
    /// It has taken this many.
    Taken(u64),
    /// It has not, and will not.
    Refused(String),
    /// It did not say that it is there: nothing has begun.
    Absent(String),
    /// Nobody knows.
    Unknown,
}

/// All that is handed over.
struct Transfer {
    /// Its clocks are as they were then, or later.
    at: Instant,
    /// The names, and how long each has had no living lease.
    names: Vec<(InstanceId, Duration)>,
    /// In pieces that a NATS message can carry.
    parts: Vec<pb::Prepare>,
    /// Which leases of ours that are.
    leases: Vec<LeaseId>,
}

impl<B: Broker + Bus> Peers<B> {
    /// Hands everything to a replica that stays: each is tried that may take it, until there is no
    /// more time. `true`: nothing is ours any more. Otherwise there is nobody, and the leases stay here.
    pub async fn hand_over(&self, until: Instant) -> bool {
        self.prepared().give_up();
        // That nobody makes us an heir from here on.
        self.beat().await;
        let (mut tried, mut absent, mut patience) = (Vec::new(), Vec::new(), FIRST_TRY_TIMEOUT);
        while clock::now() < until {
            let Some(heir) = self.heir(&tried) else {
                if absent.is_empty() || patience == STEP_TIMEOUT {
                    return false;
                }
                tried.retain(|heir| !absent.contains(heir));
                patience = STEP_TIMEOUT;
                continue;
            };
            tried.push(heir);
            let Ok(nonce) = nonce() else { return false };
            let handover = &nonce[..8];
            match self.try_heir(heir, handover, patience, until).await {
                TransferResult::Taken(taken) => tracing::info!(%heir, taken, "leases handed over"),
                TransferResult::Absent(why) => {
                    tracing::info!(
                        %heir,
                        why,
                        "a replica does not say whether it takes leases over"
                    );
                    absent.push(heir);
                    continue;
                }
                TransferResult::Refused(why) => {
                    tracing::warn!(%heir, why, "a replica did not take the leases over");
                    // What it has kept places for by now is not to come.
                    let abort = Step::Abort(pb::Abort {});
                    let _ = self.step(heir, handover, abort, clock::now() + STEP_TIMEOUT / 4).await;
                    continue;
                }
                TransferResult::Unknown => {
                    tracing::warn!(
                        %heir,
                        "no answer to the hand-over: the leases are left to that replica"
                    );
                }
            }
            self.beat().await;
            return true;
        }
        false
    }

    async fn try_heir(
        &self,
        heir: InstanceId,
        handover: &[u8],
        patience: Duration,
        until: Instant,
    ) -> TransferResult {
        // Is it there? While the clocks stand still there is no time to find out.
        let nothing = Step::Prepare(pb::Prepare::default());
        let patience = until.min(clock::now() + patience);
        match self.step(heir, handover, nothing, patience).await {
            Ok(answer) if answer.done => {}
            Ok(answer) => return TransferResult::Refused(answer.why),
            Err(why) => return TransferResult::Absent(format!("{why:?}")),
        }
        // Settlements under way hold it; nothing begins before it is given back.
        let ownership = timeout_at(until.into(), async {
            let gate = self.gate.write().await;
            // Those whose callers have gone hold nothing, and go on.
            while self.lessor.is_settling() {
                sleep(SETTLING_POLL).await;
            }
            gate
        });
        let Ok(_gate) = ownership.await else {
            return TransferResult::Refused("settlements are still under way".to_owned());
        };
        self.lessor.freeze();
        let load = self.load();
        let leases = load.leases.clone();
        let given = self.give(load, heir, handover, until).await;
        if !matches!(given, TransferResult::Refused(_) | TransferResult::Absent(_)) {
            self.names().leave(heir, clock::now());
            self.lessor.forget_moved(&leases);
        }
        self.lessor.thaw();
        given
    }

    fn is_living(&self, replica: InstanceId) -> bool {
        self.members().living(clock::now()).any(|(id, _)| id == replica)
    }

    /// Who has most room among those that stay, if that is enough.
    fn heir(&self, tried: &[InstanceId]) -> Option<InstanceId> {
        let (members, now) = (self.members(), clock::now());
        let staying =
            members.living(now).filter(|(id, said)| !said.draining && !tried.contains(id));
        let (heir, said) = staying.max_by_key(|(_, said)| said.room)?;
        let leases = self.lessor.held();
        if said.room < leases as u64 {
            tracing::info!(leases, "no replica that stays has room for the leases");
            return None;
        }
        Some(heir)
    }

    async fn give(
        &self,
        load: Transfer,
        heir: InstanceId,
        handover: &[u8],
        until: Instant,
    ) -> TransferResult {
        let mut under_way = Duration::ZERO;
        for mut part in load.parts {
            let sent = clock::now();
            part.age(sent.duration_since(load.at));
            let step = Step::Prepare(part);
            match self.step(heir, handover, step, until.min(sent + STEP_TIMEOUT)).await {
                Ok(answer) if answer.done => {}
                Ok(answer) => return TransferResult::Refused(answer.why),
                Err(why) => return TransferResult::Refused(format!("{why:?}")),
            }
            under_way = under_way.max(clock::now().duration_since(sent));
        }
        let commit = pb::Commit {
            names: load.names.iter().map(|(name, _)| name.0.to_vec().into()).collect(),
            idle: load.names.iter().map(|(_, idle)| millis(*idle)).collect(),
            under_way: micros(under_way),
            leases: load.leases.len() as u64,
        };
        let mut heard = false;
        loop {
            let now = clock::now();
            let commit = Step::Commit(commit.clone());
            match self.step(heir, handover, commit, until.min(now + STEP_TIMEOUT)).await {
                Ok(answer) if answer.done => return TransferResult::Taken(answer.taken),
                // What it has not done, though it may have been told before, it may have done.
                Ok(_) if heard => return TransferResult::Unknown,
                Ok(answer) => return TransferResult::Refused(answer.why),
                Err(Unanswered::Silent) => heard = true,
                Err(Unanswered::Nobody | Unanswered::Unsent) if !heard => {
                    return TransferResult::Refused("it has gone".to_owned());
                }
                Err(Unanswered::Nobody) if !self.is_living(heir) => return TransferResult::Unknown,
                Err(Unanswered::Nobody | Unanswered::Unsent) => sleep(COMMIT_RETRY).await,
            }
            if now >= until {
                return TransferResult::Unknown;
            }
        }
    }

    async fn step(
        &self,
        heir: InstanceId,
        handover: &[u8],
        step: Step,
        until: Instant,
    ) -> Result<pb::HandoverResponse, Unanswered> {
        let handover = Bytes::copy_from_slice(handover);
        let request = pb::HandoverRequest { handover, step: Some(step) };
        let (subject, request) = (self.subject(heir, HANDOVER_SUBJECT), request.encode_to_vec());
        let answer = self.ask_once(&subject, &request, until).await?;
        pb::HandoverResponse::decode(&*answer).map_err(|_| Unanswered::Silent)
    }

    /// Everything that there is to hand over.
    fn load(&self) -> Transfer {
        let at = clock::now();
        // What is known here under a number of ours, but outside by another's.
        let mut known_as: HashMap<LeaseId, (InstanceId, LeaseId)> = HashMap::new();
        let mut parts = TransferParts::default();
        for piece in self.lessor.outcomes() {
            parts.memory(self.us, &piece);
        }
        let mut names = self.names();
        for (name, inheritance) in names.inherited() {
            self.lessor.record_ends(inheritance);
            known_as.extend(inheritance.adopted().map(|(there, here)| (here, (name, there))));
            for piece in inheritance.outcomes() {
                parts.memory(name, piece);
            }
        }
        let leaving = self.lessor.leaving();
        let leases = leaving.iter().map(|lease| lease.id).collect();
        for leaving in leaving {
            let (name, id) = known_as.get(&leaving.id).copied().unwrap_or((self.us, leaving.id));
            parts.lease(name, id, leaving);
        }
        Transfer { at, names: names.idle(at), parts: parts.done(), leases }
    }
}
