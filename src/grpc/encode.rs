//! From what was done to what is written: the lessor's words into answers, each lease with its
//! sealed token. Decides nothing.

use std::time::{Duration, Instant};

use prost_types::{Duration as PbDuration, Timestamp};

use crate::{
    broker::{Confirmation, Delivery},
    lessor::{Codec, Empty, HandedOver, Leased, Rejected, RejectedCause, Settled},
    pb,
    token::{Claims, InstanceId, Sealer},
};

/// The caller's name inside tokens until callers are authenticated.
pub(super) const ANONYMOUS: &str = "anonymous";

/// Both clocks at one moment, to turn a monotonic time into a timestamp.
#[derive(Clone, Copy)]
pub(super) struct Clocks {
    pub(super) now: Instant,
    /// Time since the Unix epoch.
    pub(super) unix: Duration,
}

impl Clocks {
    /// The wall clock's time at `when`.
    pub(super) fn unix_at(self, when: Instant) -> Duration {
        match when.checked_duration_since(self.now) {
            Some(ahead) => self.unix + ahead,
            None => self.unix.saturating_sub(self.now.duration_since(when)),
        }
    }

    fn timestamp(self, when: Instant) -> Option<Timestamp> {
        Some(timestamp(self.unix_at(when)))
    }
}

/// What seals tokens, and for whom.
pub(super) struct Seal<'s> {
    pub(super) sealer: &'s Sealer,
    pub(super) owner: InstanceId,
    pub(super) clocks: Clocks,
}

impl Seal<'_> {
    /// The answer to a Fetch. `nonces` has one for each message and each rejected one.
    pub(super) fn fetch(
        &self,
        handed: HandedOver,
        codec: Codec,
        max_bytes: u64,
        mut nonces: impl Iterator<Item = [u8; 24]>,
    ) -> pb::FetchResponse {
        let mut nonce = || nonces.next().unwrap_or_default();
        let messages = handed
            .messages
            .into_iter()
            .map(|leased| self.delivery(leased, codec, nonce()))
            .collect();
        let rejected = handed
            .rejected
            .into_iter()
            .map(|rejected| self.rejected(rejected, max_bytes, nonce()))
            .collect();
        pb::FetchResponse {
            messages,
            rejected,
            empty_reason: handed.empty.map_or(pb::EmptyReason::Unspecified, empty_reason).into(),
            pending: handed.pending,
        }
    }

    fn delivery(&self, leased: Leased, codec: Codec, nonce: [u8; 24]) -> pb::Delivery {
        let token = self.token(&leased, nonce);
        let (deadline, max_deliver) = (leased.deadline, leased.max_deliver());
        let delivery = leased.into_delivery();
        pb::Delivery {
            token,
            consumer_sequence: delivery.consumer_sequence,
            stream_sequence: delivery.stream_sequence,
            delivery_count: saturating(delivery.delivery_count),
            max_deliver: max_deliver.map_or(0, saturating),
            pending: delivery.pending,
            publish_time: Some(timestamp(Duration::from_nanos(delivery.published))),
            lease_expire_time: self.clocks.timestamp(deadline),
            lease: Some(self.left(deadline)),
            headers: headers(delivery.headers),
            payload: Some(payload(delivery.payload, codec)),
            subject: delivery.subject,
        }
    }

    fn rejected(&self, rejected: Rejected, max_bytes: u64, nonce: [u8; 24]) -> pb::Rejected {
        let Rejected { leased, cause, held } = rejected;
        let token = if held { self.token(&leased, nonce) } else { String::new() };
        let lease_expire_time = if held { self.clocks.timestamp(leased.deadline) } else { None };
        let delivery = leased.into_delivery();
        let size = delivery.payload.len() as u64;
        let (cause, detail, delivery) = match cause {
            RejectedCause::Codec(detail) => (pb::RejectedCause::Codec, detail, delivery),
            RejectedCause::TooLarge => {
                let detail = format!("does not fit into an answer of {max_bytes} bytes");
                (pb::RejectedCause::TooLarge, detail, without_bulk(delivery, max_bytes))
            }
        };
        pb::Rejected {
            cause: cause.into(),
            detail,
            subject: delivery.subject,
            stream_sequence: delivery.stream_sequence,
            delivery_count: saturating(delivery.delivery_count),
            size,
            data: delivery.payload,
            headers: headers(delivery.headers),
            token,
            lease_expire_time,
        }
    }

    fn token(&self, leased: &Leased, nonce: [u8; 24]) -> String {
        let settle_by = self.clocks.unix_at(leased.settle_by);
        let claims = Claims {
            owner: self.owner,
            lease: leased.id.get(),
            settle_by: u64::try_from(settle_by.as_millis()).unwrap_or(u64::MAX),
            created: (**leased.consumer_created()).into(),
            ack_subject: (*leased.delivery().ack.0).into(),
            principal: ANONYMOUS.into(),
        };
        self.sealer.seal(&claims, nonce)
    }

    fn left(&self, deadline: Instant) -> PbDuration {
        duration(deadline.saturating_duration_since(self.clocks.now))
    }
}

/// What was done with one token.
pub(super) struct Done {
    pub(super) outcome: pb::Outcome,
    pub(super) redeliver_time: Option<Timestamp>,
    pub(super) lease_expire_time: Option<Timestamp>,
    pub(super) lease: Option<PbDuration>,
}

impl Done {
    pub(super) fn new(settled: Settled, clocks: Clocks) -> Self {
        let none = Self {
            outcome: pb::Outcome::Duplicate,
            redeliver_time: None,
            lease_expire_time: None,
            lease: None,
        };
        match settled {
            Settled::Duplicate => none,
            Settled::Extended(deadline) => Self {
                outcome: pb::Outcome::Extended,
                lease_expire_time: clocks.timestamp(deadline),
                lease: Some(duration(deadline.saturating_duration_since(clocks.now))),
                ..none
            },
            Settled::Done { confirmation, redelivered_in } => Self {
                outcome: match confirmation {
                    Confirmation::Confirmed => pb::Outcome::Confirmed,
                    Confirmation::Sent => pb::Outcome::Sent,
                },
                redeliver_time: redelivered_in.map(|delay| timestamp(clocks.unix + delay)),
                ..none
            },
        }
    }
}

/// A message that fits nowhere keeps what fits: its subject, where that is not too long itself.
fn without_bulk(mut delivery: Delivery, max_bytes: u64) -> Delivery {
    delivery.payload.clear();
    delivery.headers.clear();
    if crate::lessor::encoded_size(&delivery) > max_bytes {
        delivery.subject.clear();
    }
    delivery
}

fn payload(bytes: bytes::Bytes, codec: Codec) -> pb::delivery::Payload {
    match codec {
        Codec::Raw => pb::delivery::Payload::Data(bytes),
        Codec::Text | Codec::Json | Codec::Auto => match std::str::from_utf8(&bytes) {
            Ok(text) => pb::delivery::Payload::Text(text.to_owned()),
            Err(_) => pb::delivery::Payload::Data(bytes),
        },
    }
}

fn headers(
    headers: Vec<(String, Vec<String>)>,
) -> std::collections::HashMap<String, pb::HeaderValues> {
    headers.into_iter().map(|(name, values)| (name, pb::HeaderValues { values })).collect()
}

fn empty_reason(empty: Empty) -> pb::EmptyReason {
    match empty {
        Empty::NoMessages => pb::EmptyReason::NoMessages,
        Empty::MaxAckPending => pb::EmptyReason::MaxAckPending,
        Empty::Paused => pb::EmptyReason::Paused,
        Empty::Draining => pb::EmptyReason::Draining,
        Empty::Rejected => pb::EmptyReason::Rejected,
    }
}

fn timestamp(unix: Duration) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(unix.as_secs()).unwrap_or(i64::MAX),
        // Below 10^9, so it fits.
        nanos: i32::try_from(unix.subsec_nanos()).unwrap_or_default(),
    }
}

fn duration(duration: Duration) -> PbDuration {
    PbDuration::try_from(duration).unwrap_or_default()
}

fn saturating(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
