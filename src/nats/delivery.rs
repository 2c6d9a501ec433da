//! Reads the messages that a pull brings: deliveries and status lines. Pure.
//!
//! A message is a delivery if its reply subject is an ack subject, whatever its status says. Before
//! nats-server 2.11.15 a stored message can carry a status line of its own.

use async_nats::{Message, header::HeaderMap};

use crate::broker::{AckSubject, Arrival, ConsumerName, Delivery, PullEnd};

/// Reads one message of an inbox. The subjects of the inbox are `prefix` and a pull's number. `None`: a
/// heartbeat, or a message that is not for us.
pub(super) fn read(message: Message, prefix: &str) -> Option<Arrival> {
    if let Some(reply) = &message.reply
        && let Some(facts) = AckFacts::parse(reply)
    {
        return Some(Arrival::Message(Box::new(delivery(&message, reply, &facts))));
    }
    let no = message.subject.strip_prefix(prefix)?.parse().ok()?;
    let status = message.status?.as_u16();
    let description = message.description.as_deref().unwrap_or_default();
    if description == "Batch Completed" && is_full(message.headers.as_ref()) {
        // A full batch is counted instead. A replicated consumer sends this status before the messages.
        return None;
    }
    let end = end(status, description)?;
    Some(Arrival::End { no, end })
}

/// Whether a pull has brought as many messages as it asked for.
fn is_full(headers: Option<&HeaderMap>) -> bool {
    let left = headers.and_then(|headers| headers.get("Nats-Pending-Messages"));
    left.is_some_and(|left| left.as_str() == "0")
}

fn delivery(message: &Message, reply: &str, facts: &AckFacts<'_>) -> Delivery {
    Delivery {
        ack: AckSubject(reply.into()),
        subject: message.subject.as_str().to_owned(),
        headers: message.headers.as_ref().map(headers).unwrap_or_default(),
        payload: message.payload.clone(),
        stream_sequence: facts.stream_sequence,
        consumer_sequence: facts.consumer_sequence,
        delivery_count: facts.delivery_count,
        pending: facts.pending,
        published: facts.published,
    }
}

fn headers(map: &HeaderMap) -> Vec<(String, Vec<String>)> {
    map.iter()
        .map(|(name, values)| {
            let values = values.iter().map(|value| value.as_str().to_owned()).collect();
            (AsRef::<str>::as_ref(name).to_owned(), values)
        })
        .collect()
}

/// The end of a pull, by its status line. The words are nats-server's.
fn end(status: u16, description: &str) -> Option<PullEnd> {
    Some(match (status, description) {
        (100, _) => return None,
        (404, _) => PullEnd::Done,
        (408, "Requests Pending") => PullEnd::RequestsPending,
        (408, _) => PullEnd::Done,
        (409, "Batch Completed") => PullEnd::Spent,
        (409, "Message Size Exceeds MaxBytes") => PullEnd::TooLarge,
        (409, text) if text.starts_with("Exceeded ") => PullEnd::Busy(text.to_owned()),
        (409, "Leadership Change" | "Server Shutdown") => PullEnd::LeaderGone,
        // 503 is "no responders": the consumer has no leader, perhaps for a short time.
        (409, "Consumer Deleted") | (503, _) => PullEnd::ConsumerGone,
        (status, text) => PullEnd::Other(format!("{status} {text}")),
    })
}

/// The fields of an ack subject.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct AckFacts<'s> {
    pub(super) stream: &'s str,
    pub(super) consumer: &'s str,
    pub(super) delivery_count: u64,
    pub(super) stream_sequence: u64,
    pub(super) consumer_sequence: u64,
    pub(super) published: u64,
    pub(super) pending: u64,
}

impl<'s> AckFacts<'s> {
    /// Reads both forms of ADR-15: 9 tokens, or 11 and more with domain and account in front. `None`: no
    /// ack subject.
    pub(super) fn parse(reply: &'s str) -> Option<Self> {
        let mut tokens = [&[][..]; 9];
        let mut count = 0;
        // Each delivery is read here, and bytes are cheaper to split than characters.
        for token in reply.strip_prefix("$JS.ACK.")?.as_bytes().split(|byte| *byte == b'.') {
            if let Some(slot) = tokens.get_mut(count) {
                *slot = token;
            }
            count += 1;
        }
        let tokens = match count {
            7 => &tokens[..7],
            9.. => &tokens[2..],
            _ => return None,
        };
        let text = |index: usize| str::from_utf8(tokens[index]).ok();
        let number = |index: usize| text(index)?.parse().ok();
        Some(Self {
            stream: text(0)?,
            consumer: text(1)?,
            delivery_count: number(2)?,
            stream_sequence: number(3)?,
            consumer_sequence: number(4)?,
            published: number(5)?,
            pending: number(6)?,
        })
    }

    /// The consumer.
    pub(super) fn name(&self) -> ConsumerName {
        ConsumerName { stream: self.stream.into(), consumer: self.consumer.into() }
    }
}

/// The consumer that a delivery belongs to. `None`: no ack subject.
pub(super) fn consumer_of(ack_subject: &str) -> Option<ConsumerName> {
    Some(AckFacts::parse(ack_subject)?.name())
}

/// Whether an ack subject names its JetStream domain, as the longer form does.
pub(super) fn names_domain(ack: &AckSubject) -> bool {
    ack.0.split('.').count() >= 11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_ack_subject_are_read() {
        for (ack, names) in [
            ("$JS.ACK.ORDERS.worker.2.7.9.1795416130077616899.3", false),
            ("$JS.ACK.hub.QTZ3.ORDERS.worker.2.7.9.1795416130077616899.3", true),
            ("$JS.ACK.hub.QTZ3.ORDERS.worker.2.7.9.1795416130077616899.3.more", true),
        ] {
            assert_eq!(names_domain(&AckSubject(ack.into())), names, "{ack}");
        }
        let v1 = AckFacts::parse("$JS.ACK.ORDERS.worker.2.7.9.1795416130077616899.3").unwrap();
        assert_eq!((v1.stream, v1.consumer), ("ORDERS", "worker"));
        assert_eq!((v1.delivery_count, v1.stream_sequence, v1.consumer_sequence), (2, 7, 9));
        assert_eq!((v1.published, v1.pending), (1_795_416_130_077_616_899, 3));

        let v2 = "$JS.ACK.hub.szMpdrwD.ORDERS.worker.2.7.9.1795416130077616899.3";
        assert_eq!(AckFacts::parse(v2).unwrap(), v1);
        assert_eq!(AckFacts::parse(&format!("{v2}.more")).unwrap(), v1);
    }

    #[test]
    fn another_subject_is_no_ack_subject() {
        for reply in [
            "$JS.ACK.S.c.1.2.3.4",
            "$JS.ACK.S.c.1.2.3.4.5.6",
            "$JS.ACK.S.c.x.2.3.4.5",
            "_INBOX.a.1",
            "",
        ] {
            assert_eq!(AckFacts::parse(reply), None, "{reply}");
        }
    }

    /// A server before 2.11.15 stores a status line as it was published, and delivers it.
    #[test]
    fn a_stored_message_with_its_own_status_is_a_delivery() {
        let message = Message {
            subject: "s".into(),
            reply: Some("$JS.ACK.S.c.1.7.9.1795416130077616899.3".into()),
            payload: bytes::Bytes::from_static(b"work"),
            headers: None,
            status: Some(async_nats::StatusCode::from_u16(408).unwrap()),
            description: Some("Request Timeout".into()),
            length: 0,
        };
        let Some(Arrival::Message(delivery)) = read(message, "inbox.") else { panic!() };
        assert_eq!((delivery.stream_sequence, &*delivery.payload), (7, &b"work"[..]));
    }

    #[test]
    fn a_batch_full_of_bytes_ends_the_pull_and_one_full_of_messages_does_not() {
        for (left, ends) in [("0", false), ("3", true)] {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Pending-Messages", left);
            let message = Message {
                subject: "inbox.7".into(),
                reply: None,
                payload: bytes::Bytes::new(),
                headers: Some(headers),
                status: Some(async_nats::StatusCode::from_u16(409).unwrap()),
                description: Some("Batch Completed".into()),
                length: 0,
            };
            let end = Arrival::End { no: 7, end: PullEnd::Spent };
            assert_eq!(read(message, "inbox."), ends.then_some(end));
        }
    }

    #[test]
    fn every_status_line_of_the_server_has_its_meaning() {
        assert_eq!(end(100, "Idle Heartbeat"), None);
        for (status, text) in [(404, "No Messages"), (408, "Request Timeout")] {
            assert_eq!(end(status, text), Some(PullEnd::Done));
        }
        assert_eq!(end(408, "Requests Pending"), Some(PullEnd::RequestsPending));
        assert_eq!(end(409, "Message Size Exceeds MaxBytes"), Some(PullEnd::TooLarge));
        assert_eq!(end(409, "Batch Completed"), Some(PullEnd::Spent));
        assert_eq!(end(409, "Server Shutdown"), Some(PullEnd::LeaderGone));
        assert_eq!(end(409, "Consumer Deleted"), Some(PullEnd::ConsumerGone));
        assert_eq!(end(503, ""), Some(PullEnd::ConsumerGone));
        let busy = "Exceeded MaxRequestBatch of 5";
        assert_eq!(end(409, busy), Some(PullEnd::Busy(busy.to_owned())));
        assert_eq!(end(400, "Bad Request"), Some(PullEnd::Other("400 Bad Request".to_owned())));
    }
}
