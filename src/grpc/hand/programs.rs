//! How answers look to programs: JSON, with all that the contract has, by its names. What is not
//! set is null.

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost_types::Duration as PbDuration;
use serde_json::{Value, json};

use super::{length, time, word};
use crate::pb::{self, delivery::Payload};

pub(super) fn fetched(answer: &pb::FetchResponse) -> String {
    json!({
        "messages": answer.messages.iter().map(message).collect::<Value>(),
        "rejected": answer.rejected.iter().map(rejected).collect::<Value>(),
        "empty_reason": answer.empty_reason().as_str_name(),
        "pending": answer.pending,
    })
    .to_string()
}

fn message(message: &pb::Delivery) -> Value {
    json!({
        "token": message.token,
        "subject": message.subject,
        "payload": payload(message.payload.as_ref()),
        "headers": headers(&message.headers),
        "stream_sequence": message.stream_sequence,
        "consumer_sequence": message.consumer_sequence,
        "delivery_count": message.delivery_count,
        "max_deliver": message.max_deliver,
        "pending": message.pending,
        "publish_time": time(message.publish_time.as_ref()),
        "lease_expire_time": time(message.lease_expire_time.as_ref()),
        "lease": seconds(message.lease.as_ref()),
    })
}

fn rejected(rejected: &pb::Rejected) -> Value {
    json!({
        "cause": rejected.cause().as_str_name().trim_start_matches("REJECTED_CAUSE_"),
        "detail": rejected.detail,
        "token": rejected.token,
        "subject": rejected.subject,
        "size": rejected.size,
        "payload": { "base64": STANDARD.encode(&rejected.data) },
        "headers": headers(&rejected.headers),
        "stream_sequence": rejected.stream_sequence,
        "delivery_count": rejected.delivery_count,
        "lease_expire_time": time(rejected.lease_expire_time.as_ref()),
    })
}

fn headers(headers: &HashMap<String, pb::HeaderValues>) -> Value {
    headers.iter().map(|(name, values)| (name.clone(), json!(values.values))).collect()
}

fn payload(payload: Option<&Payload>) -> Value {
    match payload {
        None => json!({ "text": "" }),
        Some(Payload::Text(text)) => json!({ "text": text }),
        Some(Payload::Data(bytes)) => json!({ "base64": STANDARD.encode(bytes) }),
    }
}

pub(super) fn settled(tokens: &[String], results: &[pb::SettleResult]) -> String {
    let settled = tokens.iter().zip(results).map(|(token, result)| {
        json!({
            "token": token,
            "outcome": result.error.is_none().then(|| word(result.outcome())),
            "error": result.error.as_ref().map(error),
            "redeliver_time": time(result.redeliver_time.as_ref()),
            "lease_expire_time": time(result.lease_expire_time.as_ref()),
            "lease": seconds(result.lease.as_ref()),
        })
    });
    settled.collect::<Value>().to_string()
}

fn error(error: &pb::SettleError) -> Value {
    json!({
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "retry_delay": seconds(error.retry_delay.as_ref()),
    })
}

/// As JSON has durations of protobuf: `1.5s`.
fn seconds(of: Option<&PbDuration>) -> Option<String> {
    length(of).map(|of| format!("{}s", of.as_secs_f64()))
}
