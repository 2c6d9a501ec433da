//! Finds the stored messages that no connection survives: reads a consumer's unsettled deliveries by
//! the API, whose answers are JSON with headers in base64, and asks `unreadable` of each.
//!
//! It reads and never settles. A message that is not to be had, or an answer that cannot be read,
//! is passed over: whoever asked has other means.

use std::{borrow::Cow, sync::Arc, time::Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::Deserialize;

use super::{
    Settings,
    info::{self, Unsettled},
    replies::{Replies, Request},
    unreadable::unreadable,
};
use crate::broker::{AckSubject, ConsumerName, InfoError, Unreadable};

/// Most messages that are looked at in either direction.
const MOST: usize = 1000;
/// Messages that are asked for at once: their payloads come along, before other answers.
const WINDOW: usize = 8;

/// As [`crate::broker::Broker::unreadable`] promises.
pub(super) async fn find(
    replies: &Arc<Replies>,
    settings: &Settings,
    name: &ConsumerName,
    from: u64,
    until: Instant,
) -> Result<Vec<Unreadable>, InfoError> {
    let unsettled = info::unsettled(replies, settings, name, until).await?;
    let subject = settings.api(&format!("STREAM.MSG.GET.{}", name.stream));
    let mut found = Vec::new();
    let candidates = candidates(&unsettled, from);
    // The first by itself: where we have no right to it, that is refused, and logged, once.
    let (first, rest) = candidates.split_at(candidates.len().min(1));
    for window in std::iter::once(first).chain(rest.chunks(WINDOW)) {
        let requests: Vec<Request> = window.iter().map(|at| get(&subject, *at)).collect();
        for answer in replies.ask(&requests, until).await {
            match info::body(answer, "STREAM.MSG.GET") {
                Ok(body) => found.extend(judge(&body, name, &unsettled.filters)),
                Err(error) if found.is_empty() => return Err(error),
                // What is found by now is worth more than the reason why there is no more.
                Err(_) => return Ok(found),
            }
        }
    }
    Ok(found)
}

/// Stream sequences that may be unsettled deliveries: from `from` on, then back from there.
fn candidates(unsettled: &Unsettled, from: u64) -> Vec<u64> {
    if unsettled.count == 0 {
        return Vec::new();
    }
    let (first, last) = (unsettled.floor.saturating_add(1), unsettled.last);
    let from = from.clamp(first, last.saturating_add(1).max(first));
    (from..=last).take(MOST).chain((first..from).rev().take(MOST)).collect()
}

fn get(subject: &str, sequence: u64) -> Request {
    let payload = format!(r#"{{"seq":{sequence}}}"#).into();
    Request { subject: subject.into(), payload, line: None }
}

#[derive(Deserialize)]
struct Wire<'b> {
    /// Not there for a sequence that is not stored any more.
    #[serde(borrow)]
    message: Option<Stored<'b>>,
}

#[derive(Deserialize)]
struct Stored<'b> {
    #[serde(borrow)]
    subject: Cow<'b, str>,
    seq: u64,
    #[serde(borrow, default)]
    hdrs: Cow<'b, str>,
}

fn judge(body: &Bytes, name: &ConsumerName, filters: &[String]) -> Option<Unreadable> {
    let stored = serde_json::from_slice::<Wire<'_>>(body).ok()?.message?;
    let headers = BASE64.decode(stored.hdrs.as_bytes()).ok()?;
    let why = unreadable(&stored.subject, &headers)?;
    let taken = filters.is_empty() || filters.iter().any(|filter| matches(filter, &stored.subject));
    taken.then(|| Unreadable {
        ack: ack_subject(name, stored.seq),
        stream_sequence: stored.seq,
        why: why.to_owned(),
    })
}

/// Where a delivery is settled that nobody could read. JetStream knows it by its stream sequence and
/// looks at none of the other numbers.
fn ack_subject(name: &ConsumerName, sequence: u64) -> AckSubject {
    AckSubject(format!("$JS.ACK.{}.{}.1.{sequence}.1.1.0", name.stream, name.consumer).into())
}

/// Whether a subject is one of those that a filter with wildcards means.
fn matches(filter: &str, subject: &str) -> bool {
    let (mut filter, mut subject) = (filter.split('.'), subject.split('.'));
    loop {
        match (filter.next(), subject.next()) {
            (Some(">"), Some(_)) | (None, None) => return true,
            (Some("*"), Some(_)) => {}
            (Some(wanted), Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(subject: &str, headers: &str) -> Bytes {
        let hdrs = BASE64.encode(headers);
        let message =
            serde_json::json!({ "subject": subject, "seq": 7, "hdrs": hdrs, "data": "eA==" });
        serde_json::json!({ "type": "x", "message": message }).to_string().into()
    }

    #[test]
    fn a_message_that_cannot_be_read_is_found_where_the_consumer_takes_it() {
        let name = ConsumerName { stream: "S".into(), consumer: "c".into() };
        let poison = body("a.b", "NATS/1.0\r\nA: b\rc\r\n\r\n");
        let found = judge(&poison, &name, &[]).unwrap();
        assert_eq!(&*found.ack.0, "$JS.ACK.S.c.1.7.1.1.0");
        assert_eq!((found.stream_sequence, &*found.why), (7, "a lone CR in a value"));
        assert!(judge(&poison, &name, &["x".into(), "a.*".into()]).is_some());
        assert_eq!(judge(&poison, &name, &["a.c".into()]), None);
        assert_eq!(judge(&body("a.b", "NATS/1.0\r\nA: b\r\n\r\n"), &name, &[]), None);
        assert_eq!(judge(&Bytes::from_static(br#"{"error":{"code":404}}"#), &name, &[]), None);
        assert_eq!(judge(&Bytes::from_static(b"no JSON"), &name, &[]), None);
    }

    #[test]
    fn filters_match_as_subjects_do() {
        for (filter, subject) in [("a.b", "a.b"), ("a.*", "a.b"), ("a.>", "a.b.c"), (">", "a")] {
            assert!(matches(filter, subject), "{filter} {subject}");
        }
        for (filter, subject) in [("a", "a.b"), ("a.*", "a"), ("a.>", "a"), ("a.*", "a.b.c")] {
            assert!(!matches(filter, subject), "{filter} {subject}");
        }
    }

    #[test]
    fn the_nearest_are_looked_at_and_no_more_than_a_number() {
        let unsettled = |count, floor, last| Unsettled { count, floor, last, filters: vec![] };
        assert_eq!(candidates(&unsettled(2, 3, 8), 7), [7, 8, 6, 5, 4]);
        assert_eq!(candidates(&unsettled(2, 3, 6), 0), [4, 5, 6]);
        assert_eq!(candidates(&unsettled(2, 3, 6), 9), [6, 5, 4]);
        assert!(candidates(&unsettled(0, 3, 6), 5).is_empty(), "all is settled");
        assert!(candidates(&unsettled(1, 6, 6), 7).is_empty());
        assert!(candidates(&unsettled(1, 7, 5), 3).is_empty());
        let many = candidates(&unsettled(9, 0, u64::MAX), 5000);
        assert_eq!((many.len(), many[0], many[MOST]), (2 * MOST, 5000, 4999));
    }
}
