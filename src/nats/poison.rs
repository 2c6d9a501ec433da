//! Finds stored messages that no connection survives. Reads a consumer's unsettled deliveries by the
//! API, whose answers are JSON with headers in base64, and asks `unreadable` about each one.
//!
//! It reads and never settles. It skips a message that it cannot get, and an answer that it cannot read:
//! the caller has other means.

use std::{borrow::Cow, ops::RangeInclusive, time::Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::Deserialize;

use super::{
    api::JetStreamApi,
    info::{self, UnsettledRange},
    plan::Request,
    presence::Presence,
    unreadable::unreadable,
};
use crate::broker::{AckSubject, ConsumerName, InfoError, Search as Found, Unreadable};

/// Most requests for the messages of one part of a stream.
const MAX_SEARCH_REQUESTS: usize = 1000;
/// Most requests at once. Their answers carry the payloads, and delay other answers.
const WINDOW: usize = 8;
/// Most bytes of answers at once, if every message has the largest size: well below the amount that a
/// server keeps waiting for one client.
const WINDOW_BYTES: u64 = 4 << 20;

/// Searches as [`crate::broker::Broker::unreadable`] promises.
pub(super) async fn find(
    api: &JetStreamApi<'_>,
    presence: &Presence,
    name: &ConsumerName,
    from: u64,
    until: Instant,
) -> Result<Found, InfoError> {
    let unsettled = info::unsettled(api, presence, name, until).await?;
    let mut search = Search {
        api,
        name,
        subject: api.settings.api(&format!("STREAM.MSG.GET.{}", name.stream)),
        until,
        window: window(api.requests.connection.max_payload),
        asked: false,
        all: true,
        found: Vec::new(),
    };
    let most = (MAX_SEARCH_REQUESTS / unsettled.filters.len()).max(WINDOW);
    for part in parts(&unsettled, from) {
        for filter in &unsettled.filters {
            match search.walk(filter, part.clone(), most).await {
                Err(error) if search.found.is_empty() => return Err(error),
                // The messages that were found are worth more than the reason for the failure.
                Err(_) => return Ok(Found { found: search.found, complete: false }),
                Ok(()) => {}
            }
        }
    }
    Ok(Found { found: search.found, complete: search.all })
}

/// The number of answers at once with messages of this size. Base64 makes messages larger by a third.
pub(super) fn window(max_payload: u64) -> usize {
    let fit = WINDOW_BYTES / (max_payload + max_payload / 3).max(1);
    usize::try_from(fit).unwrap_or(WINDOW).clamp(1, WINDOW)
}

/// The stream sequences that may be unsettled, in the order of the search: from `from` on, then right
/// before `from`, then all others.
fn parts(unsettled: &UnsettledRange, from: u64) -> Vec<RangeInclusive<u64>> {
    let (first, last) = (unsettled.floor.saturating_add(1), unsettled.last);
    if unsettled.count == 0 || first > last {
        return Vec::new();
    }
    let from = from.clamp(first, last.saturating_add(1));
    let near = from.saturating_sub(MAX_SEARCH_REQUESTS as u64).max(first);
    let parts = [from..=last, near..=from - 1, first..=near - 1];
    parts.into_iter().filter(|part| !part.is_empty()).collect()
}

struct Search<'s> {
    api: &'s JetStreamApi<'s>,
    name: &'s ConsumerName,
    /// `$JS.API.STREAM.MSG.GET.<stream>`.
    subject: String,
    until: Instant,
    window: usize,
    /// Whether a request was sent.
    asked: bool,
    /// Whether every message was looked at.
    all: bool,
    found: Vec<Unreadable>,
}

impl Search<'_> {
    /// Looks at the messages of this part that the filter takes, with at most `most` requests.
    async fn walk(
        &mut self,
        filter: &str,
        part: RangeInclusive<u64>,
        most: usize,
    ) -> Result<(), InfoError> {
        let (mut next, last, mut asked) = (*part.start(), *part.end(), 0);
        while next <= last && asked < most {
            // The first request is sent alone: without a right to it, the log has one refusal.
            let window = if std::mem::replace(&mut self.asked, true) { self.window } else { 1 };
            asked += window;
            // Each request is for the first message from a sequence on. In a dense stream the answers
            // are different messages. Otherwise the last answer is far ahead, and none before it is
            // left out.
            let ahead = (next..=last).take(window);
            let requests: Vec<Request> = ahead.map(|at| self.ask(filter, at)).collect();
            next = next.saturating_add(requests.len() as u64);
            for answer in self.api.requests.ask(&requests, self.until).await {
                let body = self.api.body(answer, "STREAM.MSG.GET")?;
                match serde_json::from_slice::<Wire<'_>>(&body) {
                    Ok(Wire { message: Some(stored) }) => {
                        next = next.max(stored.seq.saturating_add(1));
                        if part.contains(&stored.seq) {
                            self.check(&stored).await?;
                        }
                    }
                    Ok(Wire { message: None }) => next = u64::MAX,
                    Err(_) => self.all = false,
                }
            }
        }
        self.all &= next > last;
        Ok(())
    }

    fn ask(&self, filter: &str, at: u64) -> Request {
        let payload = serde_json::json!({ "seq": at, "next_by_subj": filter }).to_string();
        Request::new(&self.subject, payload.into())
    }

    async fn check(&mut self, stored: &Stored<'_>) -> Result<(), InfoError> {
        let known = |found: &Unreadable| found.stream_sequence == stored.seq;
        if self.found.iter().any(known) {
            return Ok(());
        }
        let mut unreadable = unreadable_headers(stored, self.name);
        if unreadable.is_none() && stored.subject.contains(char::REPLACEMENT_CHARACTER) {
            unreadable = self.is_not_text(stored).await?.then(|| Unreadable {
                ack: ack_subject(self.name, stored.seq),
                stream_sequence: stored.seq,
                why: "a subject that is not UTF-8".to_owned(),
            });
        }
        self.found.extend(unreadable);
        Ok(())
    }

    /// Whether the subject is not UTF-8. JSON replaces such bytes by a character that text can contain,
    /// too. Only in a text is the message found under the subject as JSON shows it.
    async fn is_not_text(&mut self, stored: &Stored<'_>) -> Result<bool, InfoError> {
        let request = self.ask(&stored.subject, stored.seq);
        let answer = self.api.requests.ask_one(request, self.until).await;
        let body = self.api.body(answer, "STREAM.MSG.GET")?;
        match serde_json::from_slice::<Wire<'_>>(&body) {
            Ok(Wire { message }) => Ok(message.is_none_or(|message| message.seq != stored.seq)),
            Err(_) => {
                self.all = false;
                Ok(false)
            }
        }
    }
}

#[derive(Deserialize)]
struct Wire<'b> {
    /// `None` if the sequence is no longer stored.
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

/// The message as an unreadable one, if its headers are unreadable.
fn unreadable_headers(stored: &Stored<'_>, name: &ConsumerName) -> Option<Unreadable> {
    let headers = BASE64.decode(stored.hdrs.as_bytes()).ok()?;
    unreadable(&stored.subject, &headers).map(|why| Unreadable {
        ack: ack_subject(name, stored.seq),
        stream_sequence: stored.seq,
        why: why.to_owned(),
    })
}

/// The ack subject of a delivery that nobody could read. JetStream uses its stream sequence and none of
/// the other numbers.
fn ack_subject(name: &ConsumerName, sequence: u64) -> AckSubject {
    AckSubject(format!("$JS.ACK.{}.{}.1.{sequence}.1.1.0", name.stream, name.consumer).into())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn body(subject: &str, headers: &str) -> Bytes {
        let hdrs = BASE64.encode(headers);
        let message =
            serde_json::json!({ "subject": subject, "seq": 7, "hdrs": hdrs, "data": "eA==" });
        serde_json::json!({ "type": "x", "message": message }).to_string().into()
    }

    fn found(body: &Bytes) -> Option<Unreadable> {
        let name = ConsumerName { stream: "S".into(), consumer: "c".into() };
        let wire: Wire<'_> = serde_json::from_slice(body).unwrap();
        unreadable_headers(&wire.message?, &name)
    }

    #[test]
    fn an_unreadable_message_differs_from_a_readable_and_a_missing_one() {
        let poison = found(&body("a.b", "NATS/1.0\r\nA: b\rc\r\n\r\n")).unwrap();
        assert_eq!(&*poison.ack.0, "$JS.ACK.S.c.1.7.1.1.0");
        assert_eq!((poison.stream_sequence, &*poison.why), (7, "a lone CR in a value"));
        assert_eq!(found(&body("a.b", "NATS/1.0\r\nA: b\r\n\r\n")), None);
        assert_eq!(found(&Bytes::from_static(br#"{"error":{"code":404}}"#)), None);
    }

    #[test]
    fn the_search_starts_at_the_last_arrival_then_goes_back_then_elsewhere() {
        let unsettled = |count, floor, last| UnsettledRange { count, floor, last, filters: vec![] };
        assert_eq!(parts(&unsettled(2, 3, 8), 7), [7..=8, 4..=6]);
        assert_eq!(parts(&unsettled(2, 3, 6), 0), [4..=6]);
        assert_eq!(parts(&unsettled(2, 3, 6), 9), [4..=6]);
        assert_eq!(parts(&unsettled(2, 3, 9999), 5000), [5000..=9999, 4000..=4999, 4..=3999]);
        assert!(parts(&unsettled(0, 3, 6), 5).is_empty(), "all is settled");
        assert!(parts(&unsettled(1, 6, 6), 7).is_empty());
        assert!(parts(&unsettled(1, 7, 5), 3).is_empty());
    }
}
