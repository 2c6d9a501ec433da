//! From what was done to what is written: the lessor's words into answers, each lease with its
//! sealed token. Decides nothing.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost_types::{Duration as PbDuration, Timestamp};

use crate::{
    api_error::ApiError,
    broker::{Confirmation, Delivery},
    clock,
    lessor::{
        Action, Codec, Empty, Fetched, LeasedDelivery, Rejected, RejectedCause, Settled,
        encoded_size,
    },
    pb,
    reason::Reason,
    token::{Claims, InstanceId, Sealer},
};

/// The caller's name inside tokens until callers are authenticated.
pub(super) const ANONYMOUS: &str = "anonymous";

/// Both clocks at one moment, to turn a monotonic time into a timestamp.
#[derive(Clone, Copy)]
pub(super) struct ClockPair {
    pub(super) now: Instant,
    /// Time since the Unix epoch.
    pub(super) unix: Duration,
}

impl ClockPair {
    /// Both, now.
    pub(super) fn read() -> Self {
        Self { now: clock::now(), unix: clock::unix_time() }
    }

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
    pub(super) clocks: ClockPair,
}

impl Seal<'_> {
    /// The answer to a Fetch. `nonces` has one for each message and each rejected one.
    pub(super) fn fetch(
        &self,
        fetched: &Fetched,
        codec: Codec,
        max_bytes: u64,
        mut nonces: impl Iterator<Item = [u8; 24]>,
    ) -> pb::FetchResponse {
        let mut nonce = || nonces.next().unwrap_or_default();
        let messages = fetched.messages().iter();
        let messages = messages.map(|leased| self.delivery(leased, codec, nonce())).collect();
        let rejected = fetched.rejected().iter();
        let rejected =
            rejected.map(|rejected| self.rejected(rejected, max_bytes, nonce())).collect();
        pb::FetchResponse {
            messages,
            rejected,
            empty_reason: fetched.empty().map_or(pb::EmptyReason::Unspecified, empty_reason).into(),
            pending: fetched.pending(),
            ack_pending: fetched.ack_pending(),
        }
    }

    fn delivery(&self, leased: &LeasedDelivery, codec: Codec, nonce: [u8; 24]) -> pb::Delivery {
        let delivery = leased.delivery();
        pb::Delivery {
            token: self.token(leased, nonce),
            subject: delivery.subject.clone(),
            payload: Some(payload(&delivery.payload, codec)),
            headers: headers(&delivery.headers),
            stream_sequence: delivery.stream_sequence,
            consumer_sequence: delivery.consumer_sequence,
            delivery_count: saturating(delivery.delivery_count),
            max_deliver: leased.max_deliver().map_or(0, saturating),
            pending: delivery.pending,
            publish_time: Some(timestamp(Duration::from_nanos(delivery.published))),
            lease_expire_time: self.clocks.timestamp(leased.deadline),
            lease: Some(self.left(leased.deadline)),
        }
    }

    fn rejected(&self, rejected: &Rejected, max_bytes: u64, nonce: [u8; 24]) -> pb::Rejected {
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
            token: if *held { self.token(leased, nonce) } else { String::new() },
            lease_expire_time: held.then(|| self.clocks.timestamp(leased.deadline)).flatten(),
            lease: held.then(|| self.left(leased.deadline)),
        };
        match cause {
            RejectedCause::Codec(detail) => pb::Rejected { detail: detail.clone(), ..whole },
            RejectedCause::TooLarge => without_bulk(whole, delivery, max_bytes),
        }
    }

    fn token(&self, leased: &LeasedDelivery, nonce: [u8; 24]) -> String {
        let settle_by = self.clocks.unix_at(leased.settle_by);
        let claims = Claims {
            owner: self.owner,
            lease: leased.id.get(),
            settle_by: u64::try_from(settle_by.as_millis()).unwrap_or(u64::MAX),
            leader: leased.leader.0,
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
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct SettleOutcome {
    pub(super) outcome: pb::Outcome,
    pub(super) redeliver_time: Option<Timestamp>,
    pub(super) lease_expire_time: Option<Timestamp>,
    pub(super) lease: Option<PbDuration>,
}

impl SettleOutcome {
    pub(super) fn new(settled: Settled, clocks: ClockPair) -> Self {
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

/// What came of one token, in a Settle.
pub(super) fn settle_result(result: Result<SettleOutcome, ApiError>) -> pb::SettleResult {
    match result {
        Ok(done) => pb::SettleResult {
            outcome: done.outcome.into(),
            error: None,
            redeliver_time: done.redeliver_time,
            lease_expire_time: done.lease_expire_time,
            lease: done.lease,
        },
        Err(refused) => {
            pb::SettleResult { error: Some(settle_error(&refused)), ..pb::SettleResult::default() }
        }
    }
}

/// The same read back, from the answer of another replica. What a newer one says in words that are
/// not known here is not taken for success.
pub(super) fn relayed(result: pb::SettleResult) -> Result<SettleOutcome, ApiError> {
    match result.error {
        Some(error) => Err(refused_there(error)),
        None if result.outcome() == pb::Outcome::Unspecified => {
            Err(ApiError::OwnerUnreachable { maybe_applied: true })
        }
        None => Ok(SettleOutcome {
            outcome: result.outcome(),
            redeliver_time: result.redeliver_time,
            lease_expire_time: result.lease_expire_time,
            lease: result.lease,
        }),
    }
}

fn settle_error(error: &ApiError) -> pb::SettleError {
    let reason = error.reason();
    pb::SettleError {
        reason: reason.name().to_owned(),
        message: error.message(),
        metadata: error.metadata(),
        retry_delay: reason.retry_after().map(duration),
    }
}

/// The refusal of another replica. A reason that only a newer replica knows says nothing here.
fn refused_there(pb::SettleError { reason, message, metadata, .. }: pb::SettleError) -> ApiError {
    match Reason::ALL.iter().copied().find(|known| known.name() == reason) {
        Some(reason) => ApiError::Relayed { reason, message, metadata },
        None => ApiError::OwnerUnreachable { maybe_applied: true },
    }
}

/// What to do with one lease, as another replica is asked to do it. An Extend without a length has
/// `unset` for one.
pub(super) fn settlement(action: &Action, unset: Duration) -> pb::Settlement {
    use pb::settlement::Action as Wire;
    let action = match action {
        Action::Ack => Wire::Ack(pb::AckAction {}),
        Action::Nak(delay) => Wire::Nak(pb::NakAction { delay: Some(duration(*delay)) }),
        Action::Term(reason) => Wire::Term(pb::TermAction { reason: reason.clone() }),
        Action::Extend(lease) => {
            Wire::Extend(pb::ExtendAction { lease: Some(duration(lease.unwrap_or(unset))) })
        }
    };
    pb::Settlement { token: String::new(), action: Some(action) }
}

pub(super) fn confirmation(confirmation: Confirmation) -> pb::Confirmation {
    match confirmation {
        Confirmation::Confirmed => pb::Confirmation::Confirmed,
        Confirmation::Sent => pb::Confirmation::Sent,
    }
}

/// A message that fits nowhere keeps what fits: its subject, where that is not too long itself.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_newer_replica_answers_in_words_of_its_own_is_not_taken_for_success() {
        for outcome in [0, 99] {
            let newer = pb::SettleResult { outcome, ..pb::SettleResult::default() };
            let relayed = relayed(newer);
            assert!(matches!(relayed, Err(ApiError::OwnerUnreachable { maybe_applied: true })));
        }
        let known = pb::Outcome::Duplicate;
        let known = pb::SettleResult { outcome: known.into(), ..pb::SettleResult::default() };
        assert!(relayed(known).is_ok());
    }
}
