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
//! 3. no clock ends later at the heir than at the leaver.

mod heir;
mod wire;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use tokio::time::{sleep, timeout_at};

pub(super) use self::heir::Prepared;
use self::wire::{Parts, micros};
use super::{HANDOVER, Names, Peers, Unanswered, nonce};
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    lease::LeaseId,
    pb::peer::v1::{self as pb, handover_request::Step},
    token::InstanceId,
};

/// Heirs that are tried.
const TRIES: usize = 2;
/// An heir has this long for one step.
const PATIENCE: Duration = Duration::from_secs(2);
/// Commit is repeated after this where NATS is away.
const AGAIN: Duration = Duration::from_millis(100);

/// How a hand-over to one heir ended.
enum Given {
    /// It has taken this many.
    Taken(u64),
    /// It has not, and will not.
    Refused(String),
    /// Nobody knows.
    Unknown,
}

impl<B: Broker + Bus> Peers<B> {
    /// Hands everything to a replica that stays. `true`: nothing is ours any more. Otherwise there
    /// is nobody, and the leases stay here.
    pub async fn hand_over(&self, until: Instant) -> bool {
        // That nobody makes us an heir from here on.
        self.beat().await;
        let mut tried = Vec::new();
        while tried.len() < TRIES {
            let Some(heir) = self.heir(&tried) else { break };
            tried.push(heir);
            let given = self.try_heir(heir, until).await;
            match &given {
                Given::Taken(taken) => tracing::info!(%heir, taken, "leases handed over"),
                Given::Refused(why) => {
                    tracing::warn!(%heir, why, "a replica did not take the leases over");
                    continue;
                }
                Given::Unknown => {
                    tracing::warn!(%heir, "no answer to whether the leases were taken over: they are left to that replica");
                }
            }
            self.lessor.broker().listen(self.subjects(&[]));
            self.beat().await;
            return true;
        }
        false
    }

    async fn try_heir(&self, heir: InstanceId, until: Instant) -> Given {
        let handover = match nonce() {
            Ok(nonce) => nonce[..8].to_vec(),
            Err(_) => return Given::Refused("no randomness".to_owned()),
        };
        // Is it there? While the clocks stand still there is no time to find out.
        let nothing = Step::Prepare(pb::Prepare::default());
        let patience = until.min(clock::now() + PATIENCE);
        match self.step(heir, &handover, nothing, patience).await {
            Ok(answer) if answer.done => {}
            Ok(answer) => return Given::Refused(answer.why),
            Err(why) => return Given::Refused(format!("{why:?}")),
        }
        // Settlements under way hold it; nothing begins before it is given back.
        let Ok(mut names) = timeout_at(until.into(), self.names.write()).await else {
            return Given::Refused("settlements are still under way".to_owned());
        };
        self.lessor.freeze();
        let (parts, leases) = self.parts(&mut names);
        let given = self.give(&names, parts, leases.len() as u64, heir, &handover, until).await;
        if !matches!(given, Given::Refused(_)) {
            names.leave();
            self.lessor.let_go(&leases);
        }
        self.lessor.thaw();
        given
    }

    fn is_living(&self, replica: InstanceId) -> bool {
        self.roster().living(clock::now()).any(|(id, _)| id == replica)
    }

    /// Who has most room among those that stay.
    fn heir(&self, tried: &[InstanceId]) -> Option<InstanceId> {
        let (roster, now) = (self.roster(), clock::now());
        let staying = roster.living(now).filter(|(id, said)| !said.draining && !tried.contains(id));
        staying.max_by_key(|(_, said)| said.room).map(|(id, _)| id)
    }

    async fn give(
        &self,
        names: &Names,
        parts: Vec<pb::Prepare>,
        leases: u64,
        heir: InstanceId,
        handover: &[u8],
        until: Instant,
    ) -> Given {
        let mut under_way = Duration::ZERO;
        for part in parts {
            let sent = clock::now();
            let step = Step::Prepare(part);
            match self.step(heir, handover, step, until.min(sent + PATIENCE)).await {
                Ok(answer) if answer.done => {}
                Ok(answer) => return Given::Refused(answer.why),
                Err(why) => {
                    let abort = Step::Abort(pb::Abort {});
                    let _ = self.step(heir, handover, abort, clock::now() + PATIENCE).await;
                    return Given::Refused(format!("{why:?}"));
                }
            }
            under_way = under_way.max(clock::now().duration_since(sent));
        }
        let commit = pb::Commit {
            names: names.all().iter().map(|name| name.0.to_vec().into()).collect(),
            under_way: micros(under_way),
            leases,
        };
        let mut heard = false;
        loop {
            let now = clock::now();
            let commit = Step::Commit(commit.clone());
            match self.step(heir, handover, commit, until.min(now + PATIENCE)).await {
                Ok(answer) if answer.done => return Given::Taken(answer.taken),
                Ok(answer) => return Given::Refused(answer.why),
                Err(Unanswered::Silent) => heard = true,
                Err(Unanswered::Nobody | Unanswered::Unsent) if !heard => {
                    return Given::Refused("it has gone".to_owned());
                }
                Err(Unanswered::Nobody) if !self.is_living(heir) => return Given::Unknown,
                Err(Unanswered::Nobody | Unanswered::Unsent) => sleep(AGAIN).await,
            }
            if now >= until {
                return Given::Unknown;
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
        let (subject, request) = (self.subject(heir, HANDOVER), request.encode_to_vec());
        let answer = self.ask_once(&subject, &request, until).await?;
        pb::HandoverResponse::decode(&*answer).map_err(|_| Unanswered::Silent)
    }

    /// Everything that there is to hand over, in pieces that a NATS message can carry, and which
    /// leases of ours that are.
    fn parts(&self, names: &mut Names) -> (Vec<pb::Prepare>, Vec<LeaseId>) {
        // What is known here under a number of ours, but outside by another's.
        let mut known_as: HashMap<LeaseId, (InstanceId, LeaseId)> = HashMap::new();
        let mut parts = Parts::default();
        for piece in self.lessor.memories() {
            parts.memory(self.us, &piece);
        }
        for (name, inheritance) in names.inherited() {
            self.lessor.settle_up(inheritance);
            known_as.extend(inheritance.taken().map(|(there, here)| (here, (name, there))));
            for piece in inheritance.memories() {
                parts.memory(name, piece);
            }
        }
        let leaving = self.lessor.leaving();
        let leases = leaving.iter().map(|lease| lease.id).collect();
        for leaving in leaving {
            let (name, id) = known_as.get(&leaving.id).copied().unwrap_or((self.us, leaving.id));
            parts.lease(name, id, leaving);
        }
        (parts.done(), leases)
    }
}
