//! The messages that a handler and an event get, and how their payloads are decoded. Settles nothing.

use std::{collections::BTreeMap, fmt, ops::Deref, sync::Arc, time::SystemTime};

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::pb;

/// Each name has all its values, in order. Names are as published, with upper and lower case.
pub type Headers = BTreeMap<String, Vec<String>>;

/// A message that is leased to this worker. `T` is the type of its decoded payload. All other fields are those of its
/// [`Envelope`]: `message.subject`.
#[derive(Clone, Debug)]
pub struct Message<T> {
    /// The decoded payload.
    pub data: T,
    envelope: Arc<Envelope>,
}

impl<T> Message<T> {
    pub(crate) fn new(data: T, envelope: Arc<Envelope>) -> Self {
        Self { data, envelope }
    }

    /// The message without its decoded payload.
    pub fn envelope(&self) -> &Arc<Envelope> {
        &self.envelope
    }
}

impl<T> Deref for Message<T> {
    type Target = Envelope;

    fn deref(&self) -> &Envelope {
        &self.envelope
    }
}

/// A message, but for its decoded payload.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Envelope {
    /// The payload as published.
    pub payload: Bytes,
    /// The subject under which the stream stores the message.
    pub subject: String,
    /// The headers as published.
    pub headers: Headers,
    /// The number of the message in its stream, from 1.
    pub stream_sequence: u64,
    /// The number of this attempt, from 1.
    pub delivery_count: u32,
    /// The number of attempts after which JetStream gives the message up. 0: never.
    pub max_deliver: u32,
    /// When the stream stored the message.
    pub timestamp: SystemTime,
    /// Settles the message, in a call of your own.
    pub token: String,
}

impl Envelope {
    pub(crate) fn of(delivery: pb::Delivery) -> Self {
        use pb::delivery::Payload;
        let payload = match delivery.payload {
            Some(Payload::Text(text)) => text.into(),
            Some(Payload::Data(data)) => data,
            None => Bytes::new(),
        };
        let timestamp = delivery.publish_time.and_then(|time| time.try_into().ok());
        Self {
            payload,
            subject: delivery.subject,
            headers: headers_of(delivery.headers),
            stream_sequence: delivery.stream_sequence,
            delivery_count: delivery.delivery_count,
            max_deliver: delivery.max_deliver,
            timestamp: timestamp.unwrap_or(SystemTime::UNIX_EPOCH),
            token: delivery.token,
        }
    }

    /// After this attempt there is no other: a Nak would end the message.
    pub fn is_last_attempt(&self) -> bool {
        self.max_deliver > 0 && self.delivery_count >= self.max_deliver
    }

    /// False if the message is all headers, such as a tombstone of a key-value bucket.
    pub fn has_payload(&self) -> bool {
        !self.payload.is_empty()
            || !WITHOUT_PAYLOAD.iter().any(|name| self.headers.contains_key(*name))
    }
}

/// The headers of messages that were published, or are delivered, without payload.
pub(crate) const WITHOUT_PAYLOAD: [&str; 3] =
    ["Nats-Msg-Size", "Nats-Marker-Reason", "KV-Operation"];

fn headers_of(headers: std::collections::HashMap<String, pb::HeaderValues>) -> Headers {
    headers.into_iter().map(|(name, values)| (name, values.values)).collect()
}

/// A message that cannot be delivered as this worker asks.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Rejected {
    /// Why the message is rejected.
    pub cause: RejectedCause,
    /// The exact fault, as text for people.
    pub detail: String,
    /// Empty if not even the subject fits into an answer.
    pub subject: String,
    /// The number of the message in its stream, from 1.
    pub stream_sequence: u64,
    /// The number of this attempt, from 1.
    pub delivery_count: u32,
    /// The size of the payload, in bytes.
    pub size: u64,
    /// The payload that failed the codec. Empty if the message is too large.
    pub payload: Bytes,
    /// Empty if the message is too large.
    pub headers: Headers,
    /// Settles the message. Empty: the proxy has terminated the message.
    pub token: String,
}

/// Why a message is rejected.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RejectedCause {
    /// It is not JSON, or not UTF-8.
    Codec,
    /// It is larger than `max_bytes`.
    TooLarge,
    /// This version does not know the cause.
    Unknown,
}

impl Rejected {
    pub(crate) fn of(rejected: pb::Rejected) -> Self {
        let cause = match rejected.cause() {
            pb::RejectedCause::Codec => RejectedCause::Codec,
            pb::RejectedCause::TooLarge => RejectedCause::TooLarge,
            pb::RejectedCause::Unspecified => RejectedCause::Unknown,
        };
        Self {
            cause,
            detail: rejected.detail,
            subject: rejected.subject,
            stream_sequence: rejected.stream_sequence,
            delivery_count: rejected.delivery_count,
            size: rejected.size,
            payload: rejected.data,
            headers: headers_of(rejected.headers),
            token: rejected.token,
        }
    }
}

/// `data` out of JSON. A message without payload is `null`.
pub(crate) fn json<T: DeserializeOwned>(envelope: &Envelope) -> Result<T, serde_json::Error> {
    if envelope.has_payload() {
        serde_json::from_slice(&envelope.payload)
    } else {
        serde_json::from_str("null")
    }
}

/// `data` out of UTF-8.
pub(crate) fn text(envelope: &Envelope) -> Result<String, std::string::FromUtf8Error> {
    String::from_utf8(envelope.payload.to_vec())
}

/// The reason of a Term for a payload that cannot be decoded.
pub(crate) fn undecodable(error: impl fmt::Display) -> String {
    format!("the payload cannot be decoded: {error}")
}
