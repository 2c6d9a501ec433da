//! `fetch-proxy fetch`, `ack` and their like: the contract in an operator's hand, for images without
//! a shell. A client like any other; knows nothing of the server beside it.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost_types::{Duration as PbDuration, Timestamp};
use serde_json::{Value, json};
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::pb::{
    self, delivery::Payload, fetch_service_client::FetchServiceClient, settlement::Action,
};

/// An answer takes no longer than this, beside the time that it was asked to wait.
const PATIENCE: Duration = Duration::from_secs(10);

/// A client of the fetch-proxy at `addr`, whose answers are for people, or JSON.
#[derive(Debug)]
pub struct Hand {
    /// Host and port, or a URL.
    pub addr: String,
    /// Whether to print JSON.
    pub json: bool,
}

/// What to print, and whether all went well.
type Shown = Result<(String, bool), String>;

impl Hand {
    /// Takes messages.
    ///
    /// # Errors
    /// Why there is no answer, for people.
    pub async fn fetch(&self, request: pb::FetchRequest, max_wait: Duration) -> Shown {
        let mut request = Request::new(pb::FetchRequest { max_wait: wire(max_wait)?, ..request });
        request.set_timeout(max_wait + PATIENCE);
        let answer = self.client().await?.fetch(request).await;
        let answer = answer.map_err(|status| told(&status))?.into_inner();
        let shown = if self.json { fetched_json(&answer).to_string() } else { fetched(&answer) };
        Ok((shown, true))
    }

    /// Does the same with every token.
    ///
    /// # Errors
    /// Why there is no answer, for people; a refusal of one token is no error of the call.
    pub async fn settle(&self, tokens: Vec<String>, action: Action) -> Shown {
        let settlement = |token| pb::Settlement { token, action: Some(action.clone()) };
        let settlements = tokens.into_iter().map(settlement).collect();
        let mut request = Request::new(pb::SettleRequest { settlements, ..Default::default() });
        request.set_timeout(PATIENCE);
        let answer = self.client().await?.settle(request).await;
        let answer = answer.map_err(|status| told(&status))?.into_inner();
        let shown = if self.json {
            Value::from_iter(answer.results.iter().map(settled_json)).to_string()
        } else {
            answer.results.iter().map(settled).collect::<Vec<_>>().join("\n")
        };
        Ok((shown, answer.failed == 0))
    }

    async fn client(&self) -> Result<FetchServiceClient<Channel>, String> {
        let channel = connect(&self.addr, PATIENCE).await?;
        Ok(FetchServiceClient::new(channel).max_decoding_message_size(usize::MAX))
    }
}

/// A connection to a host and port, or a URL.
///
/// # Errors
/// Why there is none, for people.
pub(super) async fn connect(addr: &str, patience: Duration) -> Result<Channel, String> {
    let url = if addr.contains("://") { addr.to_owned() } else { format!("http://{addr}") };
    let wrong = |error| format!("{addr}: {}", chain(&error));
    let endpoint = Endpoint::from_shared(url).map_err(wrong)?.connect_timeout(patience);
    endpoint.connect().await.map_err(wrong)
}

/// A duration as the contract has it.
///
/// # Errors
/// When it is too long for any.
pub fn wire(duration: Duration) -> Result<Option<PbDuration>, String> {
    PbDuration::try_from(duration).map(Some).map_err(|error| error.to_string())
}

/// An error and what caused it: tonic's own text says only that there is one.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn told(status: &Status) -> String {
    match status.get_details_error_info() {
        Some(info) => format!("{}: {}", info.reason, status.message()),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

fn fetched(answer: &pb::FetchResponse) -> String {
    let mut text = String::new();
    for message in &answer.messages {
        let of = match message.max_deliver {
            0 => String::new(),
            most => format!(" of {most}"),
        };
        let _ = writeln!(
            text,
            "{}  sequence {}, attempt {}{of}, published {}",
            message.subject,
            message.stream_sequence,
            message.delivery_count,
            time(message.publish_time.as_ref()),
        );
        for (name, values) in &message.headers {
            for value in &values.values {
                let _ = writeln!(text, "  {name}: {value}");
            }
        }
        let _ = writeln!(text, "  {}", payload_text(message.payload.as_ref()));
        let _ = writeln!(text, "  yours for {}, by this token:", span(message.lease.as_ref()));
        let _ = writeln!(text, "{}\n", message.token);
    }
    for rejected in &answer.rejected {
        let _ = writeln!(
            text,
            "{}  sequence {}: rejected, {}",
            rejected.subject, rejected.stream_sequence, rejected.detail
        );
        if !rejected.token.is_empty() {
            let _ =
                writeln!(text, "  it is yours all the same, by this token:\n{}\n", rejected.token);
        }
    }
    if answer.messages.is_empty() {
        let _ = writeln!(text, "no messages: {}", why_empty(answer.empty_reason()));
    }
    let _ = write!(text, "{} more are waiting", answer.pending);
    text
}

fn why_empty(reason: pb::EmptyReason) -> &'static str {
    match reason {
        pb::EmptyReason::NoMessages | pb::EmptyReason::Unspecified => "there is nothing to deliver",
        pb::EmptyReason::MaxAckPending => {
            "as many are out as the consumer's max_ack_pending allows"
        }
        pb::EmptyReason::Paused => "the consumer is paused",
        pb::EmptyReason::Draining => "this replica is leaving; ask again",
        pb::EmptyReason::Rejected => "all that came was rejected",
    }
}

fn fetched_json(answer: &pb::FetchResponse) -> Value {
    let headers = |headers: &std::collections::HashMap<String, pb::HeaderValues>| {
        headers.iter().map(|(name, values)| (name.clone(), json!(values.values))).collect::<Value>()
    };
    let message = |message: &pb::Delivery| {
        json!({
            "token": message.token,
            "subject": message.subject,
            "payload": payload_json(message.payload.as_ref()),
            "headers": headers(&message.headers),
            "stream_sequence": message.stream_sequence,
            "delivery_count": message.delivery_count,
            "max_deliver": message.max_deliver,
            "publish_time": time(message.publish_time.as_ref()),
            "lease_expire_time": time(message.lease_expire_time.as_ref()),
        })
    };
    let rejected = |rejected: &pb::Rejected| {
        json!({
            "token": rejected.token,
            "subject": rejected.subject,
            "detail": rejected.detail,
            "payload": { "base64": STANDARD.encode(&rejected.data) },
            "headers": headers(&rejected.headers),
            "stream_sequence": rejected.stream_sequence,
            "delivery_count": rejected.delivery_count,
        })
    };
    json!({
        "messages": answer.messages.iter().map(message).collect::<Value>(),
        "rejected": answer.rejected.iter().map(rejected).collect::<Value>(),
        "empty_reason": answer.empty_reason().as_str_name(),
        "pending": answer.pending,
    })
}

fn payload_text(payload: Option<&Payload>) -> String {
    match payload {
        None => String::new(),
        Some(Payload::Text(text)) => text.clone(),
        Some(Payload::Data(bytes)) => {
            format!("{} bytes, in base64: {}", bytes.len(), STANDARD.encode(bytes))
        }
    }
}

fn payload_json(payload: Option<&Payload>) -> Value {
    match payload {
        None => json!({ "text": "" }),
        Some(Payload::Text(text)) => json!({ "text": text }),
        Some(Payload::Data(bytes)) => json!({ "base64": STANDARD.encode(bytes) }),
    }
}

fn settled(result: &pb::SettleResult) -> String {
    if let Some(error) = &result.error {
        return format!("{}: {}", error.reason, error.message);
    }
    let mut text = word(result.outcome()).to_owned();
    if let Some(again) = &result.redeliver_time {
        let _ = write!(text, ", comes back at {}", time(Some(again)));
    }
    if let Some(end) = &result.lease_expire_time {
        let _ = write!(text, ", yours until {}", time(Some(end)));
    }
    text
}

fn settled_json(result: &pb::SettleResult) -> Value {
    match &result.error {
        Some(error) => json!({ "error": error.reason, "message": error.message }),
        None => json!({
            "outcome": word(result.outcome()),
            "redeliver_time": result.redeliver_time.as_ref().map(|at| time(Some(at))),
            "lease_expire_time": result.lease_expire_time.as_ref().map(|at| time(Some(at))),
        }),
    }
}

fn word(outcome: pb::Outcome) -> &'static str {
    outcome.as_str_name().trim_start_matches("OUTCOME_")
}

fn time(at: Option<&Timestamp>) -> String {
    let at = at.and_then(|at| SystemTime::try_from(*at).ok());
    at.map(|at| humantime::format_rfc3339_millis(at).to_string()).unwrap_or_default()
}

fn span(of: Option<&PbDuration>) -> String {
    let of = of.and_then(|of| Duration::try_from(*of).ok()).unwrap_or_default();
    humantime::format_duration(Duration::from_secs(of.as_secs())).to_string()
}
