//! Reads the messages of deliveries again, by the API of their stream. It reads and never settles.

use std::{borrow::Cow, time::Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::Deserialize;

use super::{
    api::{ErrorBody, JetStreamApi},
    delivery::AckFacts,
    plan::Request,
    poison::window,
};
use crate::broker::{AckSubject, Delivery, InfoError};

/// JetStream's code for a stream that does not exist, and for a sequence without a message.
const NO_STREAM: u32 = 10059;
const NO_MESSAGE: u32 = 10037;

/// Reads as [`crate::broker::Broker::read_again`] promises.
pub(super) async fn read(
    api: &JetStreamApi<'_>,
    deliveries: &[AckSubject],
    until: Instant,
) -> Result<Vec<Option<Delivery>>, InfoError> {
    let mut found = Vec::with_capacity(deliveries.len());
    // The first request is sent alone: without a right to it, the log has one refusal.
    let (first, rest) = deliveries.split_at(deliveries.len().min(1));
    for asked in [first].into_iter().chain(rest.chunks(window(api.requests.connection.max_payload)))
    {
        let asked: Vec<_> = asked.iter().map(|ack| (ack, AckFacts::parse(&ack.0))).collect();
        let request = |facts: &AckFacts<'_>| {
            let subject = api.settings.api(&format!("STREAM.MSG.GET.{}", facts.stream));
            let payload = serde_json::json!({ "seq": facts.stream_sequence }).to_string();
            Request::new(&subject, payload.into())
        };
        let requests: Vec<_> =
            asked.iter().filter_map(|(_, facts)| Some(request(facts.as_ref()?))).collect();
        let mut answers = api.requests.ask(&requests, until).await.into_iter();
        for (ack, facts) in asked {
            let answer = facts.and_then(|facts| Some((facts, answers.next()?)));
            let Some((facts, answer)) = answer else {
                found.push(None);
                continue;
            };
            found.push(delivery(ack, &facts, &api.body(answer, "STREAM.MSG.GET")?)?);
        }
    }
    Ok(found)
}

#[derive(Deserialize)]
struct Wire<'b> {
    #[serde(borrow)]
    message: Option<Stored<'b>>,
    error: Option<ErrorBody>,
}

#[derive(Deserialize)]
struct Stored<'b> {
    #[serde(borrow)]
    subject: Cow<'b, str>,
    #[serde(borrow)]
    time: Cow<'b, str>,
    #[serde(borrow, default)]
    hdrs: Cow<'b, str>,
    #[serde(borrow, default)]
    data: Cow<'b, str>,
}

/// The delivery with the message of this answer. `None`: the message is gone, or the stream was made again and has
/// another one.
fn delivery(
    ack: &AckSubject,
    facts: &AckFacts<'_>,
    body: &[u8],
) -> Result<Option<Delivery>, InfoError> {
    let unreadable =
        || InfoError::Unavailable("the answer to STREAM.MSG.GET cannot be read".to_owned());
    let stored = match serde_json::from_slice::<Wire<'_>>(body).map_err(|_| unreadable())? {
        Wire { message: Some(stored), .. } => stored,
        Wire { error: Some(ErrorBody { err_code: NO_MESSAGE, .. }), .. } => return Ok(None),
        Wire { error: Some(ErrorBody { err_code: NO_STREAM, .. }), .. } => {
            return Err(InfoError::NoStream);
        }
        Wire { error, .. } => {
            let why = error.map(|error| error.description).unwrap_or_default();
            return Err(InfoError::Unavailable(format!("STREAM.MSG.GET was refused: {why}")));
        }
    };
    let decoded = |text: &str| BASE64.decode(text.as_bytes()).map_err(|_| unreadable());
    let time = humantime::parse_rfc3339(&stored.time).map_err(|_| unreadable())?;
    let published = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    if published.as_nanos() != u128::from(facts.published) {
        return Ok(None);
    }
    Ok(Some(Delivery {
        ack: ack.clone(),
        subject: stored.subject.clone().into_owned(),
        payload: decoded(&stored.data)?.into(),
        headers: headers(&decoded(&stored.hdrs)?),
        stream_sequence: facts.stream_sequence,
        consumer_sequence: facts.consumer_sequence,
        delivery_count: facts.delivery_count,
        pending: facts.pending,
        published: facts.published,
    }))
}

/// The headers of a message that was delivered before, so they are readable.
fn headers(block: &[u8]) -> Vec<(String, Vec<String>)> {
    let text = String::from_utf8_lossy(block);
    let mut lines = text.lines().skip(1).peekable();
    let mut headers: Vec<(String, Vec<String>)> = Vec::new();
    while let Some(line) = lines.next() {
        let Some((name, first)) = line.split_once(':') else { continue };
        let mut value = first.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        let value = value.trim_end().to_owned();
        match headers.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => headers.push((name.to_owned(), vec![value])),
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: &str = "$JS.ACK.S.c.2.7.9.1795416130077616899.3";

    fn read(body: &serde_json::Value) -> Result<Option<Delivery>, InfoError> {
        let facts = AckFacts::parse(ACK).unwrap();
        delivery(&AckSubject(ACK.into()), &facts, body.to_string().as_bytes())
    }

    #[test]
    fn stored_message_is_the_delivery_again() {
        let headers = "NATS/1.0\r\nA: b\r\nB:c\r\nA: d \r\n\r\n";
        let body = |time: &str| {
            let (hdrs, data) = (BASE64.encode(headers), BASE64.encode("x"));
            let message = serde_json::json!(
                { "subject": "a.b", "seq": 7, "hdrs": hdrs, "data": data, "time": time });
            serde_json::json!({ "message": message })
        };
        let found = read(&body("2026-11-23T07:22:10.077616899Z")).unwrap();
        // The time in the ack subject.
        let at = std::time::Duration::from_nanos(1_795_416_130_077_616_899);
        let time = humantime::format_rfc3339_nanos(std::time::UNIX_EPOCH + at).to_string();
        assert_eq!(found.is_some(), time == "2026-11-23T07:22:10.077616899Z");
        let found = read(&body(&time)).unwrap().unwrap();
        assert_eq!((&*found.subject, &*found.payload), ("a.b", &b"x"[..]));
        assert_eq!((found.delivery_count, found.consumer_sequence, found.pending), (2, 9, 3));
        let values = |name: &str| found.headers.iter().find(|(known, _)| known == name).unwrap();
        assert_eq!(
            (&values("A").1[..], &values("B").1[..]),
            (&["b", "d"].map(str::to_owned)[..], &["c".to_owned()][..])
        );
    }

    #[test]
    fn message_that_is_gone_differs_from_one_that_cannot_be_read() {
        let error = |code: u32, description: &str| serde_json::json!({ "error": { "err_code": code, "description": description } });
        assert_eq!(read(&error(10037, "no message found")), Ok(None));
        assert_eq!(read(&error(10059, "stream not found")), Err(InfoError::NoStream));
        assert!(matches!(read(&error(10008, "unavailable")), Err(InfoError::Unavailable(_))));
        assert!(matches!(read(&serde_json::json!({})), Err(InfoError::Unavailable(_))));
    }
}
