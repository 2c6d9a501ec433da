//! Reads requests into the lessor's types, or names the field that is wrong. The only file that applies the
//! contract's limits and defaults. Pure.

use std::{net::SocketAddr, sync::Arc, time::Duration, time::Instant};

use http::HeaderName;
use prost_types::Duration as PbDuration;
use tonic::metadata::MetadataMap;

use crate::{
    api_error::ApiError,
    broker::{Confirmation, ConsumerName},
    lessor::{Action, CallerDeadline, Codec, FetchCaller, FetchParams},
    limits::{
        DEFAULT_MAX_BYTES, DEFAULT_WAIT, LEAST_MAX_BYTES, LONGEST_ATTEMPT, LONGEST_DELAY,
        LONGEST_LINGER, LONGEST_NAME, LONGEST_REASON, LONGEST_WAIT, LONGEST_WORKER, MOST_MAX_BYTES,
        MOST_MESSAGES, MOST_SETTLEMENTS, SHORTEST_LEASE,
    },
    pb::{self, time::to_duration},
};

/// The header with the time until the deadline of the caller.
const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The header with the number of earlier attempts, if a gRPC library repeats a call.
const PREVIOUS_ATTEMPTS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");

/// Reads a Fetch. `left` is the time until the caller's deadline, or until its credential ends.
pub(super) fn fetch(
    request: &pb::FetchRequest,
    principal: Arc<str>,
    (identity, peer): (&str, Option<SocketAddr>),
    now: Instant,
    left: Option<Duration>,
) -> Result<FetchParams, ApiError> {
    let stream = name("stream", &request.stream)?;
    let consumer = name("consumer", &request.consumer)?;
    if attempt(&request.attempt_id)?.is_empty() && request.attempt_again {
        return refuse("attempt_again", "needs attempt_id");
    }
    let max_wait = optional("max_wait", request.max_wait.as_ref())?;
    let linger = optional("linger", request.linger.as_ref())?;
    Ok(FetchParams {
        name: ConsumerName { stream, consumer },
        n: request.n.clamp(1, MOST_MESSAGES),
        max_bytes: match request.max_bytes {
            0 => DEFAULT_MAX_BYTES,
            1..LEAST_MAX_BYTES => {
                return refuse("max_bytes", format!("must be 0 or at least {LEAST_MAX_BYTES}"));
            }
            bytes => bytes.min(MOST_MAX_BYTES).into(),
        },
        max_wait: max_wait.unwrap_or(DEFAULT_WAIT).min(LONGEST_WAIT),
        linger: linger.unwrap_or_default().min(LONGEST_LINGER),
        lease: lease("lease", request.lease.as_ref())?,
        caller: Arc::new(FetchCaller::new(&request.worker, identity, peer)),
        principal,
        codec: codec(request.codec)?,
        patience: left.map(|left| CallerDeadline {
            until: now + left.saturating_sub(slack(left)),
            answer_by: now + left.saturating_sub(slack(left) / 3),
        }),
    })
}

/// Reads a GiveBack: the consumer, and the name of the attempt.
pub(super) fn give_back(request: &pb::GiveBackRequest) -> Result<(ConsumerName, &str), ApiError> {
    let stream = name("stream", &request.stream)?;
    let name = ConsumerName { stream, consumer: name("consumer", &request.consumer)? };
    if request.attempt_id.is_empty() {
        return refuse("attempt_id", "must be set");
    }
    Ok((name, attempt(&request.attempt_id)?))
}

/// Reads the name of an attempt, which may be empty.
fn attempt(attempt: &str) -> Result<&str, ApiError> {
    if attempt.len() > LONGEST_ATTEMPT {
        return refuse("attempt_id", format!("must be at most {LONGEST_ATTEMPT} bytes"));
    }
    Ok(attempt)
}

/// Reads the name of a consumer.
pub(super) fn consumer_name(request: &pb::GetConsumerRequest) -> Result<ConsumerName, ApiError> {
    let stream = name("stream", &request.stream)?;
    Ok(ConsumerName { stream, consumer: name("consumer", &request.consumer)? })
}

/// Reads a Nak. `prefix` is the path of its fields.
pub(super) fn nak(prefix: &str, delay: Option<&PbDuration>) -> Result<Action, ApiError> {
    let field = format!("{prefix}delay");
    let delay = optional(&field, delay)?.unwrap_or_default();
    if delay > LONGEST_DELAY {
        return refuse(&field, format!("must be at most {}h", LONGEST_DELAY.as_secs() / 3600));
    }
    Ok(Action::Nak(delay))
}

/// Reads a Term. A long reason is cut, never refused.
pub(super) fn term(reason: String) -> Action {
    Action::Term(cut(reason, LONGEST_REASON))
}

/// Cuts the long fields of a Fetch, which would take memory while it waits.
pub(super) fn shortened(request: pb::FetchRequest) -> pb::FetchRequest {
    pb::FetchRequest { worker: cut(request.worker, LONGEST_WORKER), ..request }
}

fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.shrink_to_fit();
    }
    text
}

/// Reads an Extend.
pub(super) fn extend(prefix: &str, lease: Option<&PbDuration>) -> Result<Action, ApiError> {
    self::lease(&format!("{prefix}lease"), lease).map(Action::Extend)
}

/// Reads the settlements of a call, of which there must be `least`.
pub(super) fn settlements(
    settlements: Vec<pb::Settlement>,
    least: usize,
) -> Result<Vec<(String, Action)>, ApiError> {
    let count = settlements.len();
    if !(least..=MOST_SETTLEMENTS).contains(&count) {
        let why = format!("must be {least} to {MOST_SETTLEMENTS}, not {count}");
        return refuse("settlements", why);
    }
    let wanted = settlements.into_iter().enumerate();
    wanted.map(|(index, one)| settlement(index, one)).collect()
}

/// Reads one entry of the settlements of a call.
fn settlement(index: usize, settlement: pb::Settlement) -> Result<(String, Action), ApiError> {
    let action = action(index, settlement.action)?;
    if settlement.number != 0 {
        return refuse(&format!("settlements[{index}].number"), "has a meaning in a Consume alone");
    }
    if settlement.token.is_empty() {
        return refuse(&format!("settlements[{index}].token"), "must be set");
    }
    Ok((settlement.token, action))
}

/// Reads the action of one entry.
fn action(index: usize, action: Option<pb::settlement::Action>) -> Result<Action, ApiError> {
    use pb::settlement::Action as Wire;
    let path = |field: &str| format!("settlements[{index}].{field}");
    match action {
        None => refuse(&path("action"), "must be one of ack, nak, term and extend"),
        Some(Wire::Ack(pb::AckAction {})) => Ok(Action::Ack),
        Some(Wire::Nak(action)) => nak(&path("nak."), action.delay.as_ref()),
        Some(Wire::Term(action)) => Ok(term(action.reason)),
        Some(Wire::Extend(action)) => extend(&path("extend."), action.lease.as_ref()),
    }
}

/// Reads the confirmation that the caller wants.
pub(super) fn confirmation(value: i32) -> Result<Confirmation, ApiError> {
    match pb::Confirmation::try_from(value) {
        Ok(pb::Confirmation::Unspecified | pb::Confirmation::Confirmed) => {
            Ok(Confirmation::Confirmed)
        }
        Ok(pb::Confirmation::Sent) => Ok(Confirmation::Sent),
        Err(_) => refuse("confirmation", format!("{value} is not a Confirmation")),
    }
}

/// The time until the deadline that the caller's gRPC library sent.
pub(super) fn time_left(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.as_ref().get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// Whether the gRPC library of the caller repeats a call.
pub(super) fn was_repeated(metadata: &MetadataMap) -> bool {
    let earlier = metadata.as_ref().get(PREVIOUS_ATTEMPTS).and_then(|text| text.to_str().ok());
    earlier.and_then(|text| text.parse::<u32>().ok()).is_some_and(|earlier| earlier > 0)
}

/// The time between the answer of a call and its caller's deadline: a tenth of the time that is left, enough
/// for a round trip, a second at most.
pub(super) fn slack(left: Duration) -> Duration {
    (left / 10).clamp(Duration::from_millis(20), Duration::from_secs(1))
}

/// Reads a name. It must follow JetStream's rules, and it must be a valid token of a subject.
fn name(field: &str, value: &str) -> Result<Arc<str>, ApiError> {
    let forbidden =
        |c: char| matches!(c, '.' | '*' | '>' | '/' | '\\') || c.is_whitespace() || c.is_control();
    if value.is_empty() {
        refuse(field, "must be set")
    } else if value.len() > LONGEST_NAME {
        refuse(field, format!("must be at most {LONGEST_NAME} bytes"))
    } else if value.contains(forbidden) {
        refuse(field, "must not hold `.`, `*`, `>`, a slash, white space or control characters")
    } else {
        Ok(value.into())
    }
}

fn codec(value: i32) -> Result<Codec, ApiError> {
    match pb::Codec::try_from(value) {
        Ok(pb::Codec::Unspecified | pb::Codec::Raw) => Ok(Codec::Raw),
        Ok(pb::Codec::Text) => Ok(Codec::Text),
        Ok(pb::Codec::Json) => Ok(Codec::Json),
        Ok(pb::Codec::Auto) => Ok(Codec::Auto),
        Err(_) => refuse("codec", format!("{value} is not a Codec")),
    }
}

/// Reads the length of a lease. The lessor lowers a length that is too long.
pub(super) fn lease(field: &str, value: Option<&PbDuration>) -> Result<Option<Duration>, ApiError> {
    match optional(field, value)? {
        Some(lease) if lease < SHORTEST_LEASE => {
            refuse(field, format!("must be at least {}", shown(SHORTEST_LEASE)))
        }
        lease => Ok(lease),
    }
}

/// Reads an optional duration. A negative or malformed duration is refused.
pub(super) fn optional(
    field: &str,
    value: Option<&PbDuration>,
) -> Result<Option<Duration>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    match to_duration(value) {
        Some(duration) => Ok(Some(duration)),
        None => refuse(field, "must be a duration, and not negative"),
    }
}

fn shown(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

fn refuse<T>(field: &str, why: impl Into<String>) -> Result<T, ApiError> {
    Err(ApiError::Field { field: field.to_owned(), why: why.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> pb::FetchRequest {
        pb::FetchRequest { stream: "S".into(), consumer: "c".into(), ..pb::FetchRequest::default() }
    }

    fn read(request: &pb::FetchRequest) -> Result<FetchParams, ApiError> {
        fetch(request, "anonymous".into(), ("anonymous", None), crate::clock::now(), None)
    }

    fn field(request: &pb::FetchRequest) -> String {
        match read(request) {
            Err(ApiError::Field { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    fn pb(seconds: i64, nanos: i32) -> Option<PbDuration> {
        Some(PbDuration { seconds, nanos })
    }

    #[test]
    fn missing_fields_have_their_defaults() {
        let ask = read(&request()).unwrap();
        assert_eq!((ask.n, ask.max_wait, ask.linger), (1, DEFAULT_WAIT, Duration::ZERO));
        assert_eq!((ask.lease, ask.codec, ask.max_bytes), (None, Codec::Raw, DEFAULT_MAX_BYTES));
        assert!(ask.patience.is_none());
    }

    #[test]
    fn numbers_beyond_a_limit_are_lowered() {
        let ask = read(&pb::FetchRequest {
            n: 5000,
            max_wait: pb(3600, 0),
            linger: pb(60, 0),
            max_bytes: u32::MAX,
            ..request()
        })
        .unwrap();
        assert_eq!(ask.max_bytes, u64::from(MOST_MAX_BYTES));
        assert_eq!((ask.n, ask.max_wait, ask.linger), (1000, LONGEST_WAIT, LONGEST_LINGER));
        assert_eq!(
            read(&pb::FetchRequest { max_wait: pb(0, 0), ..request() }).unwrap().max_wait,
            Duration::ZERO
        );
    }

    #[test]
    fn names_that_fit_no_subject_are_refused() {
        for bad in ["", "a.b", "*", ">", "a b", "a\tb", "a\0", "a/b", &"x".repeat(256)] {
            assert_eq!(field(&pb::FetchRequest { stream: bad.into(), ..request() }), "stream");
            assert_eq!(field(&pb::FetchRequest { consumer: bad.into(), ..request() }), "consumer");
        }
        assert!(read(&pb::FetchRequest { stream: "x".repeat(255), ..request() }).is_ok());
        assert!(read(&pb::FetchRequest { stream: "größe_1-$".into(), ..request() }).is_ok());
    }

    #[test]
    fn negative_and_malformed_durations_are_refused() {
        for bad in [
            pb(-1, 0),
            pb(0, -1),
            pb(1, -1),
            pb(0, 1_000_000_000),
            pb(i64::MAX, 0),
            pb(i64::MIN, i32::MIN),
        ] {
            assert_eq!(field(&pb::FetchRequest { max_wait: bad, ..request() }), "max_wait");
            assert_eq!(field(&pb::FetchRequest { linger: bad, ..request() }), "linger");
            assert_eq!(field(&pb::FetchRequest { lease: bad, ..request() }), "lease");
        }
    }

    #[test]
    fn lease_is_at_least_one_second_or_unset() {
        for bad in [pb(0, 0), pb(0, 999_999_999)] {
            assert_eq!(field(&pb::FetchRequest { lease: bad, ..request() }), "lease");
            assert!(matches!(extend("", bad.as_ref()), Err(ApiError::Field { .. })));
        }
        for good in [pb(1, 0), pb(315_576_000_000, 0)] {
            assert!(read(&pb::FetchRequest { lease: good, ..request() }).unwrap().lease.is_some());
        }
        assert_eq!(extend("", None).unwrap(), Action::Extend(None));
    }

    #[test]
    fn enums_and_sizes_out_of_range_are_refused() {
        assert_eq!(field(&pb::FetchRequest { codec: 99, ..request() }), "codec");
        assert_eq!(field(&pb::FetchRequest { max_bytes: 1023, ..request() }), "max_bytes");
        assert!(confirmation(7).is_err());
    }

    #[test]
    fn long_worker_name_is_cut() {
        let worker = shortened(pb::FetchRequest { worker: "w".repeat(5000), ..request() }).worker;
        assert_eq!(worker.len(), LONGEST_WORKER);
    }

    #[test]
    fn reason_is_cut_between_characters() {
        let Action::Term(reason) = term("ü".repeat(600)) else { panic!() };
        assert_eq!(reason.len(), 1024);
        let Action::Term(reason) = term(format!("x{}", "ü".repeat(600))) else { panic!() };
        assert_eq!(reason.len(), 1023);
    }

    #[test]
    fn grpc_timeout_header_is_read_in_all_units() {
        let left = |text: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", tonic::metadata::MetadataValue::from_static(text));
            time_left(&metadata)
        };
        assert_eq!(left("994480u"), Some(Duration::from_micros(994_480)));
        assert_eq!(left("1000m"), Some(Duration::from_secs(1)));
        assert_eq!(left("2H"), Some(Duration::from_secs(7200)));
        for bad in ["", "u", "123456789u", "5", "5x", "-5S"] {
            assert_eq!(left(bad), None, "{bad}");
        }
    }

    #[test]
    fn answers_leave_before_their_caller_s_deadline() {
        let ms = Duration::from_millis;
        assert_eq!(slack(ms(50)), ms(20));
        assert_eq!(slack(ms(2000)), ms(200));
        assert_eq!(slack(ms(60_000)), ms(1000));
    }
}
