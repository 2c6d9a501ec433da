//! Writes the lessor's results as answers, each lease with its sealed token. Decides nothing.

use std::{
    collections::HashMap,
    time::{Duration, Instant, UNIX_EPOCH},
};

use bytes::Bytes;
use prost_types::{Duration as PbDuration, Timestamp};

use crate::{
    api_error::ApiError,
    broker::{ConsumerInfo, Delivery},
    clock::ClockPair,
    lessor::{
        Codec, Empty, Fetched, LeasedDelivery, Rejected, RejectedCause, Unsuitable, encoded_size,
    },
    limits::MOST_MESSAGES,
    pb::{
        self,
        time::{duration, timestamp},
    },
    token::{Claims, InstanceId, Nonces, Sealer},
    traces::SpanBytes,
};

/// Seals the tokens of an answer.
pub(super) struct Seal<'s> {
    pub(super) sealer: &'s Sealer,
    pub(super) owner: InstanceId,
    pub(super) clocks: ClockPair,
    /// The principal that the tokens belong to.
    pub(super) principal: &'s str,
    /// The span of the Fetch, if it is sampled.
    pub(super) span: Option<SpanBytes>,
}

impl Seal<'_> {
    /// The answer to a Fetch, with nonces of its own.
    pub(super) fn fetch(&self, fetched: &Fetched, mut nonces: Nonces) -> pb::FetchResponse {
        let (codec, max_bytes) = (fetched.codec(), fetched.max_bytes());
        let messages = fetched.messages().iter();
        let messages = messages.map(|leased| self.delivery(leased, codec, &mut nonces)).collect();
        let rejected = fetched.rejected().iter();
        let rejected =
            rejected.map(|rejected| self.rejected(rejected, max_bytes, &mut nonces)).collect();
        pb::FetchResponse {
            messages,
            rejected,
            empty_reason: fetched.empty().map_or(pb::EmptyReason::Unspecified, empty_reason).into(),
            pending: fetched.pending(),
            ack_pending: fetched.ack_pending(),
            ..pb::FetchResponse::default()
        }
    }

    fn delivery(&self, leased: &LeasedDelivery, codec: Codec, nonces: &mut Nonces) -> pb::Delivery {
        let delivery = leased.delivery();
        pb::Delivery {
            token: self.token(leased, nonces),
            subject: delivery.subject.clone(),
            payload: Some(payload(&delivery.payload, codec)),
            headers: headers(&delivery.headers),
            stream_sequence: delivery.stream_sequence,
            consumer_sequence: delivery.consumer_sequence,
            delivery_count: saturating(delivery.delivery_count),
            max_deliver: leased.max_deliver().map_or(0, saturating),
            pending: delivery.pending,
            publish_time: Some(timestamp(Duration::from_nanos(delivery.published))),
            lease_expire_time: self.timestamp(leased.deadline),
            lease: Some(self.left(leased.deadline)),
            number: leased.number,
        }
    }

    fn rejected(&self, rejected: &Rejected, max_bytes: u64, nonces: &mut Nonces) -> pb::Rejected {
        let Rejected { leased, cause, held } = rejected;
        let delivery = leased.delivery();
        let whole = pb::Rejected {
            cause: pb::RejectedCause::Codec.into(),
            detail: String::new(),
            subject: delivery.subject.clone(),
            stream_sequence: delivery.stream_sequence,
            delivery_count: saturating(delivery.delivery_count),
            size: delivery.payload.len() as u64,
            data: delivery.payload.clone(),
            headers: headers(&delivery.headers),
            token: if *held { self.token(leased, nonces) } else { String::new() },
            lease_expire_time: held.then(|| self.timestamp(leased.deadline)).flatten(),
            lease: held.then(|| self.left(leased.deadline)),
            number: if *held { leased.number } else { 0 },
        };
        match cause {
            RejectedCause::Codec(detail) => pb::Rejected { detail: detail.clone(), ..whole },
            RejectedCause::TooLarge => without_bulk(whole, delivery, max_bytes),
        }
    }

    fn token(&self, leased: &LeasedDelivery, nonces: &mut Nonces) -> String {
        let settle_by = self.clocks.unix_at(leased.settle_by);
        let claims = Claims {
            owner: self.owner,
            lease: leased.id.get(),
            settle_by: u64::try_from(settle_by.as_millis()).unwrap_or(u64::MAX),
            leader: leased.leader.0,
            created: (**leased.consumer_created()).into(),
            ack_subject: (*leased.delivery().ack.0).into(),
            principal: self.principal.into(),
            span: self.span,
        };
        self.sealer.seal(&claims, nonces)
    }

    fn timestamp(&self, when: Instant) -> Option<Timestamp> {
        Some(timestamp(self.clocks.unix_at(when)))
    }

    fn left(&self, deadline: Instant) -> PbDuration {
        duration(deadline.saturating_duration_since(self.clocks.now))
    }
}

/// Removes the payload and the headers of a message that is too large, and the subject if it is too long.
fn without_bulk(whole: pb::Rejected, delivery: &Delivery, max_bytes: u64) -> pb::Rejected {
    let bare = Delivery { payload: Bytes::new(), headers: Vec::new(), ..delivery.clone() };
    let fits = encoded_size(&bare) <= max_bytes;
    pb::Rejected {
        cause: pb::RejectedCause::TooLarge.into(),
        detail: format!("does not fit into an answer of {max_bytes} bytes"),
        subject: if fits { whole.subject } else { String::new() },
        data: Bytes::new(),
        headers: HashMap::new(),
        ..whole
    }
}

/// A consumer for a worker. `unset_lease` is the length of a lease without a length.
pub(super) fn consumer(
    info: ConsumerInfo,
    unsuitable: Option<&Unsuitable>,
    (unset_lease, max_lease): (Duration, Duration),
) -> pb::GetConsumerResponse {
    let created = humantime::parse_rfc3339(&info.created).ok();
    let created = created.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    pb::GetConsumerResponse {
        ack_wait: Some(duration(info.ack_wait)),
        backoff: info.backoff.into_iter().map(duration).collect(),
        max_deliver: info.max_deliver.map_or(0, saturating),
        max_ack_pending: info.max_ack_pending.unwrap_or_default(),
        pending: info.pending,
        ack_pending: info.ack_pending,
        waiting: info.waiting,
        paused: info.paused,
        filter_subjects: info.filter_subjects,
        create_time: created.map(timestamp),
        unsuitable: unsuitable.map(|why| why.name().to_owned()).unwrap_or_default(),
        unset_lease: Some(duration(unset_lease)),
        max_lease: Some(duration(max_lease)),
        max_messages: MOST_MESSAGES,
    }
}

fn payload(bytes: &Bytes, codec: Codec) -> pb::delivery::Payload {
    match codec {
        Codec::Raw => pb::delivery::Payload::Data(bytes.clone()),
        Codec::Text | Codec::Json | Codec::Auto => match std::str::from_utf8(bytes) {
            Ok(text) => pb::delivery::Payload::Text(text.to_owned()),
            Err(_) => pb::delivery::Payload::Data(bytes.clone()),
        },
    }
}

fn headers(headers: &[(String, Vec<String>)]) -> HashMap<String, pb::HeaderValues> {
    let header = |(name, values): &(String, Vec<String>)| {
        (name.clone(), pb::HeaderValues { values: values.clone() })
    };
    headers.iter().map(header).collect()
}

/// Why there are no messages, in the contract.
pub(super) fn empty_reason(empty: Empty) -> pb::EmptyReason {
    match empty {
        Empty::NoMessages => pb::EmptyReason::NoMessages,
        Empty::MaxAckPending => pb::EmptyReason::MaxAckPending,
        Empty::Paused => pb::EmptyReason::Paused,
        Empty::Draining => pb::EmptyReason::Draining,
        Empty::Rejected => pb::EmptyReason::Rejected,
        Empty::AttemptOver => pb::EmptyReason::AttemptOver,
    }
}

/// The answer to a Fetch that has failed after its settlements.
pub(super) fn fetch_failed(error: &ApiError) -> pb::FetchResponse {
    let error = pb::FetchError {
        reason: error.reason().name().to_owned(),
        message: error.message(),
        metadata: error.metadata(),
        retry_delay: error.retry_after().map(duration),
    };
    let empty_reason = pb::EmptyReason::FetchFailed.into();
    pb::FetchResponse { empty_reason, error: Some(error), ..pb::FetchResponse::default() }
}

fn saturating(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        broker::AckSubject,
        token::{KeyRing, MAX_PRINCIPAL_BYTES},
    };
    use prost::Message as _;

    /// The claims take as many bytes as the longest claims of this subject can take.
    fn longest_token(ack_subject: &str) -> String {
        let claims = Claims {
            owner: InstanceId([255; 8]),
            lease: u64::MAX,
            settle_by: u64::MAX,
            leader: u64::MAX,
            created: "2026-11-23T08:00:00.123456789Z".into(),
            ack_subject: ack_subject.into(),
            principal: "p".repeat(MAX_PRINCIPAL_BYTES).into(),
            span: Some([255; 25]),
        };
        Sealer::new(KeyRing::single([1; 32]), "c").seal(&claims, &mut Nonces::from([1; 24]))
    }

    #[test]
    fn reckoned_size_of_an_answer_is_never_below_its_encoded_size() {
        let time = Some(Timestamp { seconds: i64::MAX, nanos: 999_999_999 });
        let span = Some(PbDuration { seconds: i64::MAX, nanos: 999_999_999 });
        for (subject, name, payload) in [(1, 1, 0), (255, 255, 1), (64, 10, 1 << 20)] {
            let (name, payload) = ("n".repeat(name), vec![b'x'; payload]);
            let ack = format!("$JS.ACK.domain.hash1234.{name}.{name}.1.2.3.4.5.random");
            let delivery = Delivery {
                subject: "s".repeat(subject),
                payload: payload.clone().into(),
                headers: vec![("h".repeat(subject), vec!["v".repeat(subject), String::new()])],
                ack: AckSubject(ack.clone().into()),
                stream_sequence: u64::MAX,
                consumer_sequence: u64::MAX,
                delivery_count: u64::MAX,
                pending: u64::MAX,
                published: u64::MAX,
            };
            let answered = pb::Delivery {
                number: 0,
                token: longest_token(&ack),
                subject: delivery.subject.clone(),
                payload: Some(pb::delivery::Payload::Data(payload.into())),
                headers: headers(&delivery.headers),
                stream_sequence: u64::MAX,
                consumer_sequence: u64::MAX,
                delivery_count: u32::MAX,
                max_deliver: u32::MAX,
                pending: u64::MAX,
                publish_time: time,
                lease_expire_time: time,
                lease: span,
            };
            let whole = pb::FetchResponse { messages: vec![answered], ..Default::default() };
            let (reckoned, encoded) = (encoded_size(&delivery), whole.encoded_len() as u64);
            assert!(reckoned >= encoded, "{reckoned} for {encoded} bytes");
        }
    }
}
