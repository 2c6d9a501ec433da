//! Settles on JetStream: writes acks in the server's words, and reads its answers.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{
    api::JetStreamApi,
    delivery::consumer_of,
    info,
    plan::{Request, RequestAnswer, unsent},
    presence::Presence,
};
use crate::{
    broker::{AckKind, AckPublish, BrokerError, Confirmation, ConsumerName, Denial, InfoError},
    clock::{self, Deadline, Reading},
};

/// Longest wait for the reason why nobody received a settlement. A consumer that is gone is answered at once.
const LONGEST_QUESTION: Duration = Duration::from_secs(1);

/// Settles as [`crate::broker::Broker::settle`] promises.
pub(super) async fn settle(
    api: &JetStreamApi<'_>,
    presence: &Presence,
    publishes: Vec<AckPublish>,
    confirmation: Confirmation,
    until: Instant,
) -> Vec<Result<(), BrokerError>> {
    let made = clock::reading();
    let requests: Vec<Request> =
        publishes.into_iter().map(|publish| request(publish, made)).collect();
    if confirmation == Confirmation::Sent {
        let mut sent = Vec::with_capacity(requests.len());
        for request in &requests {
            let left = api.requests.send(request, None, until).await;
            sent.push(left.then_some(()).ok_or_else(|| unsent("the settling connection is gone")));
        }
        return sent;
    }
    let answers = api.requests.ask(&requests, until).await;
    let mut settled = Vec::with_capacity(answers.len());
    // Consecutive settlements of one consumer without a responder share one CONSUMER.INFO.
    let mut looked_at: Option<(ConsumerName, BrokerError)> = None;
    for (answer, request) in answers.into_iter().zip(&requests) {
        settled.push(match answer {
            Ok(RequestAnswer::Replied(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(RequestAnswer::NoResponder) => {
                let Some(name) = consumer_of(&request.subject) else {
                    settled.push(Err(Denial::Gone.into()));
                    continue;
                };
                let known = looked_at.take().filter(|(of, _)| *of == name);
                let error = match known {
                    Some((_, error)) => error,
                    None => why_no_responder(api, presence, &name, until).await,
                };
                looked_at = Some((name, error.clone()));
                Err(error)
            }
        });
    }
    settled
}

/// Nobody received the settlement: the consumer is gone, or has no leader now.
///
/// A consumer without a leader may answer nothing. The caller and the monitor of the consumer must learn of the absence
/// while the lease lives, so the question is a short question.
async fn why_no_responder(
    api: &JetStreamApi<'_>,
    presence: &Presence,
    name: &ConsumerName,
    until: Instant,
) -> BrokerError {
    let until = until.min(clock::now() + LONGEST_QUESTION);
    match info::read(api, presence, name, until).await {
        Err(InfoError::NoStream | InfoError::NoConsumer) => Denial::Gone.into(),
        Err(InfoError::Unavailable(why)) => {
            BrokerError::Leaderless(format!("the consumer has no leader: {why}"))
        }
        Ok(_) | Err(InfoError::Permission(_)) => {
            BrokerError::Leaderless("the consumer has no leader".to_owned())
        }
    }
}

/// The payloads are those of nats-server (ADR-13 and ADR-15), which compares them exactly.
fn request(publish: AckPublish, made: Reading) -> Request {
    let payload = match publish.kind {
        AckKind::Ack => Bytes::from_static(b"+ACK"),
        AckKind::Progress => Bytes::from_static(b"+WPI"),
        AckKind::Nak(None) => Bytes::from_static(b"-NAK"),
        AckKind::Nak(Some(delay)) => format!("-NAK {{\"delay\":{}}}", delay.as_nanos()).into(),
        AckKind::Term(reason) if reason.is_empty() => Bytes::from_static(b"+TERM"),
        AckKind::Term(reason) => format!("+TERM {reason}").into(),
    };
    let by = publish.by.map(|by| Deadline::new(by, made));
    Request { subject: publish.ack.0, payload, confirm_group: publish.confirm_group, by }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::AckSubject;
    use std::time::Duration;

    fn payload(kind: AckKind) -> Bytes {
        let ack = AckSubject("$JS.ACK.S.c.1.1.1.1.0".into());
        let publish = AckPublish { ack, kind, confirm_group: None, by: None };
        request(publish, clock::reading()).payload
    }

    #[test]
    fn every_ack_is_written_as_the_server_reads_it() {
        assert_eq!(payload(AckKind::Ack), "+ACK");
        assert_eq!(payload(AckKind::Progress), "+WPI");
        assert_eq!(payload(AckKind::Nak(None)), "-NAK");
        assert_eq!(
            payload(AckKind::Nak(Some(Duration::from_secs(2)))),
            "-NAK {\"delay\":2000000000}"
        );
        assert_eq!(payload(AckKind::Term(String::new())), "+TERM");
        assert_eq!(payload(AckKind::Term("bad json".into())), "+TERM bad json");
    }
}
