//! Asks each replica of the cluster, this one included. Names each replica that does not answer, and why. Decides
//! nothing about rows.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use prost::Message as _;

use super::here::Here;
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    cluster::{Cluster, OtherReplica, Unanswered},
    pb::{
        self,
        peer::v1::{AdminAnswer, AdminRequest, DescribeReplica, admin_request::Question},
        time::duration,
    },
    token::{InstanceId, key_name},
};

/// A replica has this long to answer a question.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// The replicas of the cluster.
pub(super) struct Fleet<B: Broker + Bus> {
    pub(super) here: Arc<Here<B>>,
    cluster: Arc<Cluster<B>>,
}

/// The replicas as they are known at one moment, in the order of their identifiers. `None` is this replica.
pub(super) type KnownReplicas = BTreeMap<InstanceId, Option<OtherReplica>>;

/// An answer, or the replica that is missing.
pub(super) type Answered = Result<AdminAnswer, pb::UnreachableReplica>;

impl<B: Broker + Bus> Fleet<B> {
    pub(super) fn new(here: Arc<Here<B>>, cluster: Arc<Cluster<B>>) -> Self {
        Self { here, cluster }
    }

    /// The replicas that are there now.
    pub(super) fn replicas(&self) -> KnownReplicas {
        let others = self.cluster.others().into_iter().map(|other| (other.instance, Some(other)));
        others.chain([(self.here.facts.instance, None)]).collect()
    }

    /// Asks all of them at once. The answers are in the order of the replicas.
    pub(super) async fn ask_all(
        &self,
        known: &KnownReplicas,
        question: &Question,
    ) -> Vec<Answered> {
        let asked = known.keys().map(|replica| self.ask(known, *replica, question.clone()));
        join_all(asked).await
    }

    /// Describes each of them. A replica that does not answer is described by its last heartbeat.
    pub(super) async fn describe(&self, known: &KnownReplicas) -> pb::ListReplicasResponse {
        let question = Question::Replica(DescribeReplica {});
        let answers = self.ask_all(known, &question).await;
        let mut response = pb::ListReplicasResponse::default();
        for (other, answer) in known.values().zip(answers) {
            let answer = answer.map(|answer| answer.replica.unwrap_or_default());
            let heard_ago = other.as_ref().map(|other| duration(other.heard_ago));
            match (other, answer) {
                (_, Ok(replica)) => response.replicas.push(pb::Replica { heard_ago, ..replica }),
                (other, Err(missing)) => {
                    response.replicas.extend(other.as_ref().map(as_heard));
                    response.unreachable.push(missing);
                }
            }
        }
        response
    }

    /// Asks one of them.
    pub(super) async fn ask(
        &self,
        known: &KnownReplicas,
        replica: InstanceId,
        question: Question,
    ) -> Answered {
        let until = clock::now() + ANSWER_TIME;
        let (name, answer) = match known.get(&replica) {
            None => (String::new(), Err("it is not there, or is not heard".to_owned())),
            Some(None) => {
                let answer = self.here.answer(question, until).await;
                let busy = || format!("it is busy: it has not answered within {ANSWER_TIME:?}");
                (self.here.facts.name.clone(), answer.ok_or_else(busy))
            }
            Some(Some(other)) => (other.name.clone(), self.ask_other(other, question, until).await),
        };
        let missing = |why| pb::UnreachableReplica { instance: replica.to_string(), name, why };
        answer.map_err(missing)
    }

    async fn ask_other(
        &self,
        other: &OtherReplica,
        question: Question,
        until: Instant,
    ) -> Result<AdminAnswer, String> {
        let question = AdminRequest { question: Some(question) }.encode_to_vec();
        let answer = self.cluster.ask_operators(other.instance, &question, until).await;
        let answer = answer.map_err(|why| match why {
            Unanswered::Nobody => {
                let version = &other.version;
                format!("nobody answers: its version {version} may be too old for this question")
            }
            Unanswered::Silent => format!("it has not answered within {ANSWER_TIME:?}"),
            Unanswered::Unsent => {
                "the replica that was called has no connection to NATS".to_owned()
            }
        })?;
        AdminAnswer::decode(&*answer).map_err(|_| "its answer cannot be read".to_owned())
    }
}

/// A replica that does not answer, as far as its last heartbeat tells.
fn as_heard(other: &OtherReplica) -> pb::Replica {
    let [leases, waiters, consumers] = other.counts;
    pb::Replica {
        instance: other.instance.to_string(),
        name: other.name.clone(),
        version: other.version.clone(),
        ready: other.serves,
        draining: other.draining,
        leases,
        waiters,
        consumers,
        policy_digest: other.policy.clone(),
        key_ids: other.keys.iter().copied().map(key_name).collect(),
        heard_ago: Some(duration(other.heard_ago)),
        ..pb::Replica::default()
    }
}
