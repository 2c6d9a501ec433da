//! The answers for operators: who is there, who holds which message, and how to take a message away. The replica
//! that is called asks all replicas.
//!
//! ```text
//!  call ─▶ Inspector ─▶ fleet ─┬─▶ here ─▶ lessor, net
//!             │ filter, page,  └─▶ cluster ─▶ here, at another replica
//!             ▼ merge
//!           answer
//! ```
//! Decides no right: `may` says which consumers the caller may see. No row has a token, an ack subject, or anything
//! of a message but its sequence.

mod filter;
mod fleet;
mod here;
mod merge;
mod overview;
mod page;
mod walk;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use prost::Message as _;

pub use self::{
    filter::MeantLeases,
    here::{LeaseAges, ReplicaFacts},
    overview::Overview,
};
use self::{
    filter::{refused, text},
    fleet::Fleet,
    here::{Here, show_info},
    merge::{ToldConsumers, merged},
    page::{MOST_ROWS, PagedList},
    walk::{PAGE_TIME, Walk},
};
use crate::{
    api_error::ApiError,
    broker::{Broker, ConsumerName},
    bus::Bus,
    clock,
    cluster::Cluster,
    lessor::Lessor,
    limits::LONGEST_DELAY,
    net::OpenConnections,
    pb::{
        self,
        peer::v1::{self as wire, AdminAnswer, admin_request::Question},
        time::to_duration,
    },
    token::InstanceId,
};

/// A replica has this long to answer another replica.
const PEER_TIME: Duration = Duration::from_millis(900);
/// Most leases of one ReleaseLeases.
const MOST_RELEASED: u32 = 1000;
/// Rows in its answer.
const SHOWN_RELEASED: usize = 100;
/// INFO of a consumer that is older than this is read again for a list.
const STALE_INFO: Duration = Duration::from_secs(1);
/// Longest wait for INFO, and questions for INFO at once.
const INFO_TIME: Duration = Duration::from_secs(1);
const INFOS_AT_ONCE: usize = 16;

/// See the [module](self).
pub struct Inspector<B: Broker + Bus> {
    fleet: Fleet<B>,
}

/// Whether the caller may see, or change, what belongs to a stream and a consumer.
type May<'m> = &'m (dyn Fn(&str, &str) -> bool + Sync);

impl<B: Broker + Bus> Inspector<B> {
    /// Answers for the replica with these facts, also when other replicas ask.
    pub fn new(lessor: Lessor<B>, cluster: Arc<Cluster<B>>, facts: ReplicaFacts) -> Self {
        let here = Arc::new(Here::new(lessor, facts));
        let asked = here.clone();
        cluster.answer_operators(Box::new(move |question| {
            let here = asked.clone();
            Box::pin(async move { here.answer_peer(&question, clock::now() + PEER_TIME).await })
        }));
        Self { fleet: Fleet::new(here, cluster) }
    }

    /// The connections of clients, for their listener to list them.
    pub(crate) fn connections(&self) -> &Arc<OpenConnections> {
        &self.fleet.here.connections
    }

    /// The replicas.
    pub async fn list_replicas(&self) -> pb::ListReplicasResponse {
        self.fleet.describe(&self.fleet.replicas()).await
    }

    /// The cluster for the page for operators, as far as it is known until `until`.
    pub async fn overview(&self, until: Instant) -> Overview {
        let mut overview = overview::collect(&self.fleet, until).await;
        self.read_again(&mut overview.consumers, until).await;
        overview
    }

    /// One page of the consumers that the caller may see.
    ///
    /// # Errors
    /// The field that is wrong.
    pub async fn list_consumers(
        &self,
        request: pb::ListConsumersRequest,
        may: May<'_>,
    ) -> Result<pb::ListConsumersResponse, ApiError> {
        text("stream", &request.stream)?;
        text("consumer", &request.consumer)?;
        let rows = page::rows(request.page_size);
        let filter = [request.stream.as_bytes(), &[0], request.consumer.as_bytes()].concat();
        let mut after = page::consumer(&filter, &request.page_token)?;
        let (known, until) = (self.fleet.replicas(), clock::now() + PAGE_TIME);
        let mut response = pb::ListConsumersResponse::default();
        loop {
            let (after_stream, after_consumer) = after.clone().unwrap_or_default();
            let question = Question::Consumers(wire::DescribeConsumers {
                stream: request.stream.clone(),
                consumer: request.consumer.clone(),
                after_stream,
                after_consumer,
                limit: u32::try_from(rows).unwrap_or(u32::MAX),
            });
            let (mut told, mut missing) = (Vec::new(), Vec::new());
            for answer in self.fleet.ask_all(&known, &question).await {
                match answer {
                    Ok(AdminAnswer { consumers, more, .. }) => {
                        told.push(ToldConsumers { consumers, more });
                    }
                    Err(replica) => missing.push(replica),
                }
            }
            response.unreachable = missing;
            let (consumers, more) = merged(told, rows - response.consumers.len());
            let names = |row: &pb::Consumer| (row.stream.clone(), row.consumer.clone());
            let moved = !consumers.is_empty();
            after = consumers.last().map(names).or(after);
            let visible = consumers.into_iter().filter(|row| may(&row.stream, &row.consumer));
            response.consumers.extend(visible);
            let Some((stream, consumer)) = after.as_ref().filter(|_| more) else { break };
            if response.consumers.len() >= rows || clock::now() >= until || !moved {
                response.next_page_token = page::token_of_consumer(&filter, (stream, consumer));
                break;
            }
        }
        self.read_again(&mut response.consumers, clock::now() + INFO_TIME).await;
        Ok(response)
    }

    /// One page of the leases that the caller may see.
    ///
    /// # Errors
    /// The field that is wrong.
    pub async fn list_leases(
        &self,
        request: pb::ListLeasesRequest,
        may: May<'_>,
    ) -> Result<pb::ListLeasesResponse, ApiError> {
        let filter = request.filter.unwrap_or_default();
        let meant = MeantLeases::read(&filter)?;
        let (rows, known_filter) = (page::rows(request.page_size), filter.encode_to_vec());
        let place = page::place(PagedList::Leases, &known_filter, &request.page_token)?;
        let mut walk = Walk::new(self.fleet.replicas(), place, meant.replica());
        let mut leases = Vec::new();
        while let Some(place) = walk.go_on().filter(|_| leases.len() < rows) {
            let question = describe_leases(&filter, place.after, rows - leases.len());
            let answer = self.fleet.ask(walk.known(), place.replica, question).await;
            if let Some(answer) = walk.took(place, answer) {
                let visible = answer.leases.into_iter();
                leases.extend(visible.filter(|lease| may(&lease.stream, &lease.consumer)));
            }
        }
        let token = |place| page::token(PagedList::Leases, &known_filter, place);
        let next_page_token = walk.next().map(token).unwrap_or_default();
        Ok(pb::ListLeasesResponse { leases, next_page_token, unreachable: walk.into_unreachable() })
    }

    /// One page of the connections.
    ///
    /// # Errors
    /// The field that is wrong.
    pub async fn list_connections(
        &self,
        request: pb::ListConnectionsRequest,
    ) -> Result<pb::ListConnectionsResponse, ApiError> {
        let rows = page::rows(request.page_size);
        let place = page::place(PagedList::Connections, &[], &request.page_token)?;
        let mut walk = Walk::new(self.fleet.replicas(), place, None);
        let mut connections = Vec::new();
        while let Some(place) = walk.go_on().filter(|_| connections.len() < rows) {
            let limit = u32::try_from(rows - connections.len()).unwrap_or(u32::MAX);
            let question = wire::DescribeConnections { after: place.after, limit };
            let question = Question::Connections(question);
            let answer = self.fleet.ask(walk.known(), place.replica, question).await;
            connections.extend(walk.took(place, answer).into_iter().flat_map(|it| it.connections));
        }
        let token = |place| page::token(PagedList::Connections, &[], place);
        let next_page_token = walk.next().map(token).unwrap_or_default();
        let unreachable = walk.into_unreachable();
        Ok(pb::ListConnectionsResponse { connections, next_page_token, unreachable })
    }

    /// Takes leases away that the caller may change.
    ///
    /// # Errors
    /// The field that is wrong.
    pub async fn release_leases(
        &self,
        request: pb::ReleaseLeasesRequest,
        may: May<'_>,
    ) -> Result<pb::ReleaseLeasesResponse, ApiError> {
        let filter = request.filter.clone().unwrap_or_default();
        let meant = MeantLeases::read(&filter)?;
        if meant.is_empty() {
            return Err(refused("filter", "must have at least one field"));
        }
        let delay = request.delay.map_or(Some(Duration::ZERO), |delay| to_duration(&delay));
        let delay = delay.filter(|delay| *delay <= LONGEST_DELAY);
        let delay = delay.ok_or_else(|| refused("delay", "must be a duration of at most 24h"))?;
        let limit =
            if request.limit == 0 { MOST_RELEASED } else { request.limit.min(MOST_RELEASED) };
        let limit = u64::from(limit);
        let mut walk = Walk::new(self.fleet.replicas(), None, meant.replica());
        let mut response = pb::ReleaseLeasesResponse::default();
        while let Some(place) = walk.go_on() {
            let left = limit.saturating_sub(response.released);
            if left == 0 {
                break;
            }
            let rows = usize::try_from(left).unwrap_or(MOST_ROWS).min(MOST_ROWS);
            let question = describe_leases(&filter, place.after, rows);
            let answer = self.fleet.ask(walk.known(), place.replica, question).await;
            let Some(answer) = walk.took(place, answer) else { continue };
            let mut leases = answer.leases;
            leases
                .retain(|lease| lease.grant_time.is_some() && may(&lease.stream, &lease.consumer));
            leases.retain(|lease| {
                let settling = lease.state() != pb::LeaseState::Held;
                let last = !settling && lease.last_attempt && !request.force_last_attempts;
                response.skipped_settling += u64::from(settling);
                response.skipped_last_attempt += u64::from(last);
                !settling && !last
            });
            if !request.validate_only {
                let take = wire::TakeLeases {
                    leases: leases.iter().map(|lease| lease.lease).collect(),
                    filter: Some(filter.clone()),
                    delay: u64::try_from(delay.as_micros()).unwrap_or(u64::MAX),
                    force_last_attempts: request.force_last_attempts,
                };
                leases = self.take(&mut walk, place.replica, (leases, take), &mut response).await;
            }
            response.released += leases.len() as u64;
            let room = SHOWN_RELEASED.saturating_sub(response.leases.len());
            response.leases.extend(leases.into_iter().take(room));
        }
        response.more = walk.next().is_some();
        response.unreachable = walk.into_unreachable();
        Ok(response)
    }

    /// Takes these leases of one replica away. Returns those that were released.
    async fn take(
        &self,
        walk: &mut Walk,
        replica: InstanceId,
        (leases, take): (Vec<pb::Lease>, wire::TakeLeases),
        response: &mut pb::ReleaseLeasesResponse,
    ) -> Vec<pb::Lease> {
        if leases.is_empty() {
            return leases;
        }
        let taken = match self.fleet.ask(walk.known(), replica, Question::Take(take)).await {
            Ok(AdminAnswer { taken, .. }) => taken,
            Err(missing) => {
                let why = format!("{}; it may have released leases", missing.why);
                walk.leave(replica, pb::UnreachableReplica { why, ..missing });
                return Vec::new();
            }
        };
        let mut released = Vec::new();
        for (lease, outcome) in leases.into_iter().zip(taken) {
            match wire::TakenLease::try_from(outcome) {
                Ok(wire::TakenLease::Released) => released.push(lease),
                Ok(wire::TakenLease::LastAttempt) => response.skipped_last_attempt += 1,
                Ok(wire::TakenLease::Settling) => response.skipped_settling += 1,
                // It has ended by itself, or only a newer version knows why it stays.
                Ok(wire::TakenLease::Gone | wire::TakenLease::Unspecified) | Err(_) => {}
            }
        }
        released
    }

    /// Reads INFO of the consumers of a page again where it is old, until `until`.
    async fn read_again(&self, rows: &mut [pb::Consumer], until: Instant) {
        let stale = |row: &&mut pb::Consumer| {
            let age = row.info_age.and_then(|age| to_duration(&age));
            age.is_none_or(|age| age >= STALE_INFO)
        };
        let lessor = &self.fleet.here.lessor;
        let read = |row: &mut pb::Consumer| {
            let name = ConsumerName {
                stream: row.stream.as_str().into(),
                consumer: row.consumer.as_str().into(),
            };
            async move { lessor.consumer_info(&name, until).await.ok() }
        };
        let mut stale: Vec<&mut pb::Consumer> = rows.iter_mut().filter(stale).collect();
        let questions: Vec<_> = stale.iter_mut().map(|row| read(row)).collect();
        let answers = stream::iter(questions).buffered(INFOS_AT_ONCE).collect::<Vec<_>>().await;
        for (row, answer) in stale.into_iter().zip(answers) {
            if let Some((info, _)) = answer {
                show_info(row, &info, Duration::ZERO);
            }
        }
    }
}

fn describe_leases(filter: &pb::LeaseFilter, after: u64, rows: usize) -> Question {
    let limit = u32::try_from(rows).unwrap_or(u32::MAX);
    Question::Leases(wire::DescribeLeases { filter: Some(filter.clone()), after, limit })
}
