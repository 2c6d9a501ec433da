//! CONSUMER.INFO: asks for it and reads the answer. Only the fields that are needed are read, so that
//! new fields of a newer server cannot make a consumer unreadable.

use std::{mem::take, time::Duration, time::Instant};

use bytes::Bytes;
use serde::Deserialize;

use super::{
    api::{ErrorBody, JetStreamApi},
    presence::Presence,
};
use crate::broker::{AckPolicy, ConsumerInfo, ConsumerName, InfoError, Leader};

/// Codes in JetStream's `errors.json`.
const CONSUMER_NOT_FOUND: u32 = 10_014;
const STREAM_NOT_FOUND: u32 = 10_059;

/// Reads the consumer, bounded by `until`.
pub(super) async fn read(
    api: &JetStreamApi<'_>,
    presence: &Presence,
    name: &ConsumerName,
    until: Instant,
) -> Result<ConsumerInfo, InfoError> {
    let wire = parse(&ask(api, presence, name, until).await?)?;
    let server = api.server();
    // Behind a leaf node, or in another domain, another server answers than the connected one.
    let domain = api.settings.domain.is_none() || api.settings.domain == server.domain;
    Ok(wire.info(&server.server_id, server.jetstream && domain))
}

/// Reads where the consumer's unsettled deliveries are in its stream, bounded by `until`.
pub(super) async fn unsettled(
    api: &JetStreamApi<'_>,
    presence: &Presence,
    name: &ConsumerName,
    until: Instant,
) -> Result<UnsettledRange, InfoError> {
    parse(&ask(api, presence, name, until).await?).map(Into::into)
}

/// The part of a stream with a consumer's unsettled deliveries.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UnsettledRange {
    /// The number of unsettled deliveries.
    pub(super) count: u64,
    /// Everything up to this stream sequence is settled.
    pub(super) floor: u64,
    /// The highest stream sequence that was delivered.
    pub(super) last: u64,
    /// The subjects that the consumer takes from its stream, at least one.
    pub(super) filters: Vec<String>,
}

async fn ask(
    api: &JetStreamApi<'_>,
    presence: &Presence,
    name: &ConsumerName,
    until: Instant,
) -> Result<Bytes, InfoError> {
    let subject = api.settings.api(&format!("CONSUMER.INFO.{}.{}", name.stream, name.consumer));
    let answer = api.call(&subject, until).await;
    presence.see(api, &subject, &answer);
    api.body(answer, "CONSUMER.INFO")
}

fn parse(body: &[u8]) -> Result<Wire, InfoError> {
    match serde_json::from_slice(body) {
        Ok(Wire { error: Some(error), .. }) => Err(match error.err_code {
            STREAM_NOT_FOUND => InfoError::NoStream,
            CONSUMER_NOT_FOUND => InfoError::NoConsumer,
            _ => InfoError::Unavailable(error.description),
        }),
        Ok(wire) => Ok(wire),
        Err(error) => Err(InfoError::Unavailable(format!("CONSUMER.INFO cannot be read: {error}"))),
    }
}

#[derive(Deserialize)]
struct Wire {
    error: Option<ErrorBody>,
    #[serde(default)]
    created: String,
    #[serde(default)]
    config: Config,
    #[serde(default)]
    delivered: Sequences,
    #[serde(default)]
    ack_floor: Sequences,
    #[serde(default)]
    num_ack_pending: u64,
    #[serde(default)]
    num_pending: u64,
    #[serde(default)]
    num_waiting: u64,
    #[serde(default)]
    num_redelivered: u64,
    #[serde(default)]
    paused: bool,
    cluster: Option<Cluster>,
}

/// Durations are nanoseconds. −1 and 0 mean "no limit".
#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    ack_policy: String,
    ack_wait: u64,
    backoff: Vec<u64>,
    deliver_subject: Option<String>,
    filter_subject: String,
    filter_subjects: Vec<String>,
    max_deliver: i64,
    max_ack_pending: i64,
    max_batch: i64,
    max_expires: i64,
    max_bytes: i64,
    priority_groups: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Sequences {
    consumer_seq: u64,
    stream_seq: u64,
}

#[derive(Deserialize)]
struct Cluster {
    #[serde(default)]
    leader: String,
    /// Set by nats-server 2.12 and newer, if the consumer is replicated.
    #[serde(default)]
    leader_since: String,
    /// All replicas but the leader.
    #[serde(default)]
    replicas: Vec<serde::de::IgnoredAny>,
}

impl Wire {
    /// `server` is the id of the connected server. `alone`: it has answered itself, and is not one of
    /// several.
    fn info(self, server: &str, alone: bool) -> ConsumerInfo {
        let mut config = self.config;
        let filters = config.take_filters();
        let policy = config.ack_policy;
        ConsumerInfo {
            created: self.created.into(),
            ack_policy: match policy.as_str() {
                "explicit" => AckPolicy::Explicit,
                _ => AckPolicy::Other(policy),
            },
            push: config.deliver_subject.is_some_and(|subject| !subject.is_empty()),
            priority_groups: !config.priority_groups.is_empty(),
            paused: self.paused,
            ack_wait: Duration::from_nanos(config.ack_wait),
            backoff: config.backoff.into_iter().map(Duration::from_nanos).collect(),
            max_deliver: limit(config.max_deliver),
            max_ack_pending: limit(config.max_ack_pending),
            max_batch: limit(config.max_batch)
                .map(|batch| u32::try_from(batch).unwrap_or(u32::MAX)),
            max_expires: limit(config.max_expires).map(Duration::from_nanos),
            max_request_bytes: limit(config.max_bytes),
            leader: match &self.cluster {
                Some(cluster) => Leader::new(&cluster.leader, &cluster.leader_since),
                // A server has a new id after every start.
                None => Leader::new(server, ""),
            },
            leader_shows: match &self.cluster {
                Some(cluster) => !cluster.leader_since.is_empty(),
                None => alone,
            },
            replicas: self.cluster.map_or(1, |cluster| {
                u32::try_from(cluster.replicas.len()).unwrap_or(u32::MAX).saturating_add(1)
            }),
            pending: self.num_pending,
            ack_pending: self.num_ack_pending,
            waiting: self.num_waiting,
            redelivered: self.num_redelivered,
            filter_subjects: filters,
            delivered: self.delivered.consumer_seq,
            delivered_stream: self.delivered.stream_seq,
        }
    }
}

impl Config {
    /// The subjects that the consumer takes from its stream. Empty: all.
    fn take_filters(&mut self) -> Vec<String> {
        let one = Some(take(&mut self.filter_subject)).filter(|filter| !filter.is_empty());
        one.into_iter().chain(take(&mut self.filter_subjects)).collect()
    }
}

impl From<Wire> for UnsettledRange {
    fn from(wire: Wire) -> Self {
        let mut config = wire.config;
        let filters = config.take_filters();
        Self {
            count: wire.num_ack_pending,
            floor: wire.ack_floor.stream_seq,
            last: wire.delivered.stream_seq,
            filters: if filters.is_empty() { vec![">".to_owned()] } else { filters },
        }
    }
}

fn limit(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(body: &[u8]) -> Result<ConsumerInfo, InfoError> {
        parse(body).map(|wire| wire.info("NA7", true))
    }

    #[test]
    fn every_needed_field_of_a_consumer_is_read() {
        let info = info(
            br#"{"type":"io.nats.jetstream.api.v1.consumer_info_response","stream_name":"ORDERS",
            "name":"worker","created":"2026-11-23T08:00:00.5Z","config":{"ack_policy":"explicit",
            "ack_wait":30000000000,"backoff":[1000000000,5000000000],"max_deliver":-1,
            "max_ack_pending":1000,"max_batch":50,"num_replicas":0,"replay_policy":"instant"},
            "delivered":{"consumer_seq":12,"stream_seq":9},"num_ack_pending":3,"num_pending":7,
            "cluster":{"leader":"n1","replicas":[{"name":"n2"},{"name":"n3"}]},"a new field":1}"#,
        )
        .unwrap();
        assert_eq!(info.created.as_ref(), "2026-11-23T08:00:00.5Z");
        assert_eq!(info.ack_policy, AckPolicy::Explicit);
        assert_eq!(info.ack_wait, Duration::from_secs(30));
        assert_eq!(info.backoff, [Duration::from_secs(1), Duration::from_secs(5)]);
        assert_eq!((info.max_deliver, info.max_ack_pending), (None, Some(1000)));
        assert_eq!((info.max_batch, info.replicas), (Some(50), 3));
        assert_eq!((info.delivered, info.delivered_stream), (12, 9));
        assert_eq!((info.ack_pending, info.pending), (3, 7));
        assert!(!info.push && !info.priority_groups && !info.paused);
    }

    #[test]
    fn a_leader_differs_by_name_term_and_start_of_a_single_server() {
        let leader = |server: &str, cluster: &str| {
            let body = format!(r#"{{"created":"x","cluster":{cluster}}}"#);
            parse(body.as_bytes()).unwrap().info(server, true).leader
        };
        let led = |by: &str, since: &str| {
            let cluster = format!(r#"{{"leader":"{by}","leader_since":"{since}"}}"#);
            leader("whoever", &cluster)
        };
        // The number is fixed, because replicas of two builds compare it.
        assert_eq!(led("n1", "8:00"), Leader(0x8a32_25eb_1676_0ce6));
        assert_ne!(led("n1", "8:00"), led("n2", "8:00"));
        assert_ne!(led("n1", "8:00"), led("n1", "9:00"));
        assert_eq!(leader("one start", "null"), leader("one start", "null"));
        assert_ne!(leader("one start", "null"), leader("the next", "null"));
    }

    #[test]
    fn a_change_of_leader_shows_if_its_term_or_start_is_known() {
        let shows = |alone: bool, cluster: &str| {
            let body = format!(r#"{{"created":"x","cluster":{cluster}}}"#);
            parse(body.as_bytes()).unwrap().info("NA7", alone).leader_shows
        };
        assert!(shows(true, "null"));
        assert!(!shows(false, "null"), "behind a leaf node");
        assert!(shows(false, r#"{"leader":"n1","leader_since":"8:00"}"#));
        assert!(!shows(true, r#"{"leader":"n1"}"#), "not replicated, or before 2.12");
    }

    #[test]
    fn an_unknown_ack_policy_is_named_and_is_no_error() {
        let info = info(br#"{"created":"x","config":{"ack_policy":"flow_control"}}"#).unwrap();
        assert_eq!(info.ack_policy, AckPolicy::Other("flow_control".to_owned()));
    }

    #[test]
    fn a_missing_stream_differs_from_a_missing_consumer() {
        let error = |code| {
            format!(r#"{{"error":{{"code":404,"err_code":{code},"description":"not found"}}}}"#)
        };
        assert_eq!(info(error(10_059).as_bytes()), Err(InfoError::NoStream));
        assert_eq!(info(error(10_014).as_bytes()), Err(InfoError::NoConsumer));
        let other = InfoError::Unavailable("not found".to_owned());
        assert_eq!(info(error(10_008).as_bytes()), Err(other));
    }

    #[test]
    fn the_range_of_unsettled_deliveries_is_read() {
        let unsettled = |config: &str| {
            let body = format!(
                r#"{{"config":{config},"delivered":{{"consumer_seq":12,"stream_seq":9}},
                "ack_floor":{{"consumer_seq":4,"stream_seq":3}},"num_ack_pending":2}}"#
            );
            UnsettledRange::from(parse(body.as_bytes()).unwrap())
        };
        let filters = vec!["a".to_owned(), "b.>".to_owned()];
        let expected = UnsettledRange { count: 2, floor: 3, last: 9, filters };
        assert_eq!(unsettled(r#"{"filter_subjects":["a","b.>"]}"#), expected);
        assert_eq!(unsettled(r#"{"filter_subject":"a"}"#).filters, ["a"]);
        assert_eq!(unsettled("{}").filters, [">"]);
    }
}
