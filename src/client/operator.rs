//! The client for operators: it walks through all pages of a list, and renders the rows.

use std::time::Duration;

use prost::Message;
use prost_types::{Duration as PbDuration, Timestamp};
use tonic::{Code, Request, Response, Status, transport::Channel};
use tonic_types::StatusExt as _;

use super::{
    ANSWER_TIMEOUT, Client, bearer,
    connect::{connect, connect_here},
    format::{length, time},
    json::json_lines,
    table::table,
    text::plain,
};
use crate::pb::{self, admin_service_client::AdminServiceClient};

/// Rows of a page.
const PAGE: u32 = 500;

/// A client that calls for an operator.
#[derive(Debug)]
pub struct OperatorClient {
    calls: AdminServiceClient<Channel>,
    client: Client,
    /// It calls at the admin socket, which wants no credential.
    is_local: bool,
}

/// Rows to print.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    /// For standard output: a table, or JSON.
    pub text: String,
    /// For standard error: what is missing.
    pub notes: Vec<String>,
    /// The number of rows, or of leases that were released.
    pub count: u64,
    /// All replicas have answered.
    pub is_complete: bool,
}

/// Why there are no rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorError {
    /// The caller lacks a right.
    Refused(String),
    /// The request is wrong.
    Usage(String),
    /// Anything else.
    Failed(String),
}

type Listed = Result<Rows, OperatorError>;

impl OperatorClient {
    /// Connects to the admin socket of this name, or to the address of the client.
    ///
    /// # Errors
    /// There is no connection.
    pub async fn connect(client: Client, socket: Option<&str>) -> Result<Self, OperatorError> {
        let channel = match socket {
            Some(name) => connect_here(name, ANSWER_TIMEOUT).await,
            None => connect(&client.addr, &client.tls, ANSWER_TIMEOUT).await,
        };
        let calls = AdminServiceClient::new(channel.map_err(OperatorError::Failed)?);
        let calls = calls.max_decoding_message_size(usize::MAX);
        Ok(Self { calls, client, is_local: socket.is_some() })
    }

    /// The replicas.
    ///
    /// # Errors
    /// See [`OperatorError`].
    pub async fn replicas(&self) -> Listed {
        let request = self.request(pb::ListReplicasRequest {})?;
        let answer = self.answer(self.calls.clone().list_replicas(request).await)?;
        let headings = [
            "INSTANCE",
            "NAME",
            "VERSION",
            "READY",
            "LEASES",
            "WAITERS",
            "CONSUMERS",
            "POLICY",
            "NATS",
            "HEARD",
        ];
        let row = |replica: &pb::Replica| {
            let ready = match (replica.draining, replica.ready) {
                (true, _) => "leaving".to_owned(),
                (false, true) => "yes".to_owned(),
                (false, false) => format!("no: {}", or_dash(&replica.why_not_ready)),
            };
            vec![
                plain(&replica.instance),
                or_dash(&replica.name),
                or_dash(&replica.version),
                ready,
                replica.leases.to_string(),
                replica.waiters.to_string(),
                replica.consumers.to_string(),
                or_dash(&replica.policy_digest),
                or_dash(replica.nats_server.split_once(' ').map_or("", |(_, server)| server)),
                replica
                    .heard_ago
                    .map_or("asked".to_owned(), |ago| format!("{} ago", span(Some(&ago)))),
            ]
        };
        self.rows("Replica", &answer.replicas, &headings, row, &answer.unreachable)
    }

    /// The consumers. An empty name is any name.
    ///
    /// # Errors
    /// See [`OperatorError`].
    pub async fn consumers(&self, stream: &str, consumer: &str) -> Listed {
        let (mut rows, mut page_token) = (Vec::new(), String::new());
        let unreachable = loop {
            let request = self.request(pb::ListConsumersRequest {
                stream: stream.to_owned(),
                consumer: consumer.to_owned(),
                page_size: PAGE,
                page_token,
            })?;
            let answer = self.answer(self.calls.clone().list_consumers(request).await)?;
            rows.extend(answer.consumers);
            page_token = answer.next_page_token;
            if page_token.is_empty() {
                break answer.unreachable;
            }
        };
        let headings = [
            "STREAM",
            "CONSUMER",
            "PENDING",
            "ACK PENDING",
            "LEASES",
            "WAITERS",
            "OLDEST LEASE",
            "REPLICAS",
            "STATE",
        ];
        let row = |consumer: &pb::Consumer| {
            let total = consumer.total.clone().unwrap_or_default();
            let of = match consumer.max_ack_pending {
                0 => String::new(),
                most => format!(" of {most}"),
            };
            let state = match (consumer.paused, &*consumer.suspended) {
                (true, _) => "paused".to_owned(),
                (false, "") => "-".to_owned(),
                (false, why) => plain(why),
            };
            vec![
                plain(&consumer.stream),
                plain(&consumer.consumer),
                consumer.pending.to_string(),
                format!("{}{of}", consumer.ack_pending),
                total.leases.to_string(),
                total.waiters.to_string(),
                span(total.oldest_lease.as_ref()),
                consumer.shares.len().to_string(),
                state,
            ]
        };
        self.rows("Consumer", &rows, &headings, row, &unreachable)
    }

    /// At most `limit` leases.
    ///
    /// # Errors
    /// See [`OperatorError`].
    pub async fn leases(&self, filter: &pb::LeaseFilter, limit: u32) -> Listed {
        let (mut rows, mut page_token) = (Vec::new(), String::new());
        let mut unreachable = Vec::new();
        let more = loop {
            let left = limit.saturating_sub(u32::try_from(rows.len()).unwrap_or(u32::MAX));
            let request = self.request(pb::ListLeasesRequest {
                filter: Some(filter.clone()),
                page_size: left.clamp(1, PAGE),
                page_token,
            })?;
            let answer = self.answer(self.calls.clone().list_leases(request).await)?;
            rows.extend(answer.leases);
            unreachable.extend(answer.unreachable);
            page_token = answer.next_page_token;
            let is_full = rows.len() as u64 >= u64::from(limit);
            if page_token.is_empty() || is_full {
                break !page_token.is_empty();
            }
        };
        let mut rows = self.rows("Lease", &rows, &LEASE_HEADINGS, lease, &unreachable)?;
        if more {
            rows.notes.push(format!("there may be more leases than --limit {limit}"));
        }
        Ok(rows)
    }

    /// The connections.
    ///
    /// # Errors
    /// See [`OperatorError`].
    pub async fn connections(&self) -> Listed {
        let (mut rows, mut page_token) = (Vec::new(), String::new());
        let mut unreachable = Vec::new();
        loop {
            let request = pb::ListConnectionsRequest { page_size: PAGE, page_token };
            let request = self.request(request)?;
            let answer = self.answer(self.calls.clone().list_connections(request).await)?;
            rows.extend(answer.connections);
            unreachable.extend(answer.unreachable);
            page_token = answer.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let headings =
            ["PEER", "IDENTITY", "SINCE", "OPEN", "CALLS", "TLS", "GOOD UNTIL", "REPLICA"];
        let row = |connection: &pb::Connection| {
            vec![
                plain(&connection.peer),
                or_dash(&connection.identity),
                at(connection.since.as_ref()),
                connection.calls_open.to_string(),
                connection.calls_total.to_string(),
                or_dash(&connection.tls_version),
                at(connection.not_after.as_ref()),
                plain(&connection.replica),
            ]
        };
        self.rows("Connection", &rows, &headings, row, &unreachable)
    }

    /// The leases that [`OperatorClient::release`] would release.
    ///
    /// # Errors
    /// See [`OperatorError`].
    pub async fn would_release(&self, request: &pb::ReleaseLeasesRequest) -> Listed {
        let answer = self.release_once(request, true).await?;
        let mut rows = self.released(&answer, "would be released")?;
        if answer.more {
            rows.notes.push("more leases match".to_owned());
        }
        Ok(rows)
    }

    /// Releases all leases that match, also if there are many.
    ///
    /// # Errors
    /// See [`OperatorError`].
    pub async fn release(&self, request: &pb::ReleaseLeasesRequest) -> Listed {
        let mut sum = pb::ReleaseLeasesResponse::default();
        loop {
            let answer = self.release_once(request, false).await?;
            let goes_on = answer.more && answer.released > 0;
            sum.released += answer.released;
            // Those that were skipped stay, and are counted by each call.
            sum.skipped_last_attempt = answer.skipped_last_attempt;
            sum.skipped_settling = answer.skipped_settling;
            sum.leases.extend(answer.leases);
            (sum.more, sum.unreachable) = (answer.more, answer.unreachable);
            if !goes_on {
                return self.released(&sum, "released");
            }
        }
    }

    async fn release_once(
        &self,
        request: &pb::ReleaseLeasesRequest,
        validate_only: bool,
    ) -> Result<pb::ReleaseLeasesResponse, OperatorError> {
        let request = pb::ReleaseLeasesRequest { validate_only, ..request.clone() };
        let request = self.request(request)?;
        self.answer(self.calls.clone().release_leases(request).await)
    }

    fn released(&self, answer: &pb::ReleaseLeasesResponse, done: &str) -> Listed {
        let mut notes: Vec<String> = answer.unreachable.iter().map(missing).collect();
        let is_complete = notes.is_empty();
        if self.client.json {
            let text = json_lines("ReleaseLeasesResponse", std::slice::from_ref(answer));
            let text = text.map_err(OperatorError::Failed)?;
            return Ok(Rows { text, notes, count: answer.released, is_complete });
        }
        let rows: Vec<_> = answer.leases.iter().map(lease).collect();
        let shown =
            if rows.is_empty() { String::new() } else { table(&LEASE_HEADINGS, &rows) + "\n" };
        let mut said = vec![format!("{} {done}", leases_in_words(answer.released))];
        for (count, why) in [
            (answer.skipped_last_attempt, "of last attempts: --force-last-attempts releases them"),
            (answer.skipped_settling, "that are being settled, or may have been settled"),
        ] {
            if count > 0 {
                said.push(format!("{} skipped {why}", leases_in_words(count)));
            }
        }
        if answer.released == 0 {
            notes.push("no lease was released".to_owned());
        }
        let text = format!("{shown}{}", said.join("\n"));
        Ok(Rows { text, notes, count: answer.released, is_complete })
    }

    fn rows<R: Message>(
        &self,
        kind: &str,
        rows: &[R],
        headings: &[&str],
        row: impl Fn(&R) -> Vec<String>,
        unreachable: &[pb::UnreachableReplica],
    ) -> Listed {
        let mut notes: Vec<String> = unreachable.iter().map(missing).collect();
        let is_complete = notes.is_empty();
        let text = match (self.client.json, rows) {
            (_, []) => String::new(),
            (true, rows) => json_lines(kind, rows).map_err(OperatorError::Failed)?,
            (false, rows) => table(headings, &rows.iter().map(row).collect::<Vec<_>>()),
        };
        if rows.is_empty() {
            notes.push("nothing matches".to_owned());
        }
        Ok(Rows { text, notes, count: rows.len() as u64, is_complete })
    }

    fn request<T>(&self, message: T) -> Result<Request<T>, OperatorError> {
        let mut request = Request::new(message);
        request.set_timeout(ANSWER_TIMEOUT);
        if !self.is_local {
            let file = self.client.token_file.as_deref();
            bearer::add(&mut request, &self.client.addr, file).map_err(OperatorError::Usage)?;
        }
        Ok(request)
    }

    fn answer<T>(&self, answer: Result<Response<T>, Status>) -> Result<T, OperatorError> {
        answer.map(Response::into_inner).map_err(|status| {
            let message = self.client.explained(&status);
            let code = status.code();
            if matches!(code, Code::PermissionDenied | Code::Unauthenticated) {
                OperatorError::Refused(message)
            } else if code == Code::InvalidArgument && status.get_details_error_info().is_some() {
                OperatorError::Usage(message)
            } else {
                OperatorError::Failed(message)
            }
        })
    }
}

const LEASE_HEADINGS: [&str; 11] = [
    "STREAM",
    "CONSUMER",
    "SEQUENCE",
    "ATTEMPT",
    "STATE",
    "AGE",
    "ENDS IN",
    "PRINCIPAL",
    "WORKER",
    "PEER",
    "REPLICA",
];

fn lease(lease: &pb::Lease) -> Vec<String> {
    let of = match lease.max_deliver {
        0 => String::new(),
        most => format!(" of {most}"),
    };
    let state = lease.state().as_str_name().trim_start_matches("LEASE_STATE_").to_lowercase();
    let held = lease.grant_time.is_some();
    vec![
        plain(&lease.stream),
        plain(&lease.consumer),
        lease.stream_sequence.to_string(),
        format!("{}{of}", lease.delivery_count),
        if held { state } else { "parked".to_owned() },
        span(lease.age.as_ref()),
        ends_in(lease).map_or("-".to_owned(), short),
        or_dash(&lease.principal),
        or_dash(&lease.worker),
        or_dash(&lease.peer),
        plain(&lease.replica),
    ]
}

/// The time until the end of a lease, by the clock of the replica.
fn ends_in(lease: &pb::Lease) -> Option<Duration> {
    let unix = |at: Timestamp| {
        let seconds = u64::try_from(at.seconds).ok()?;
        Some(Duration::new(seconds, u32::try_from(at.nanos).ok()?))
    };
    let now = unix(lease.grant_time?)? + length(lease.age.as_ref())?;
    Some(unix(lease.expire_time?)?.saturating_sub(now))
}

fn missing(replica: &pb::UnreachableReplica) -> String {
    let (instance, name, why) = (&replica.instance, &replica.name, &replica.why);
    format!("replica {} ({}) is missing: {}", plain(instance), or_dash(name), plain(why))
}

fn leases_in_words(count: u64) -> String {
    if count == 1 { "1 lease".to_owned() } else { format!("{count} leases") }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { plain(text) }
}

fn at(when: Option<&Timestamp>) -> String {
    time(when).unwrap_or_else(|| "-".to_owned())
}

fn span(of: Option<&PbDuration>) -> String {
    length(of).map_or("-".to_owned(), short)
}

/// A length of time in whole seconds, without spaces.
fn short(length: Duration) -> String {
    let whole = Duration::from_secs(length.as_secs());
    humantime::format_duration(whole).to_string().replace(' ', "")
}
