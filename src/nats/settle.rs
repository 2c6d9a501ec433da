//! Settling on a real JetStream: writes verdicts as the server reads them, and reads its answers.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;

use super::{
    delivery::AckFacts,
    info,
    request_mux::{Answer, Request, RequestMux, unsent},
    supervisor::Supervisor,
};
use crate::{
    broker::{AckPublish, BrokerError, Confirmation, ConsumerName, Denial, InfoError, Verdict},
    clock::{self, Deadline},
};

/// Settles as [`crate::broker::Broker::settle`] promises.
pub(super) async fn settle(
    replies: &Arc<RequestMux>,
    supervisor: &Supervisor,
    orders: Vec<AckPublish>,
    confirmation: Confirmation,
    until: Instant,
) -> Vec<Result<(), BrokerError>> {
    let requests: Vec<Request> = orders.into_iter().map(request).collect();
    if confirmation == Confirmation::Sent {
        let mut sent = Vec::with_capacity(requests.len());
        for request in &requests {
            let left = replies.send(request, None, until).await;
            sent.push(left.then_some(()).ok_or_else(|| unsent("the settling connection is gone")));
        }
        return sent;
    }
    let answers = replies.ask(&requests, until).await;
    let mut settled = Vec::with_capacity(answers.len());
    // A consumer is looked at once, however many of its deliveries nobody answers for.
    let mut looked_at: Option<(ConsumerName, BrokerError)> = None;
    for (answer, request) in answers.into_iter().zip(&requests) {
        settled.push(match answer {
            Ok(Answer::Replied(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(Answer::NoResponder) => {
                let Some(name) = consumer_of(&request.subject) else {
                    settled.push(Err(Denial::Gone.into()));
                    continue;
                };
                let known = looked_at.take().filter(|(of, _)| *of == name);
                let error = match known {
                    Some((_, error)) => error,
                    None => why_nobody_answers(replies, supervisor, &name, until).await,
                };
                looked_at = Some((name, error.clone()));
                Err(error)
            }
        });
    }
    settled
}

/// Nobody took the settlement: because the consumer is gone, or because it has no leader just now?
async fn why_nobody_answers(
    replies: &Arc<RequestMux>,
    supervisor: &Supervisor,
    name: &ConsumerName,
    until: Instant,
) -> BrokerError {
    match info::read(replies, supervisor, name, until).await {
        Err(InfoError::NoStream | InfoError::NoConsumer) => Denial::Gone.into(),
        Err(InfoError::Unavailable(why)) => unsent(&format!("the consumer has no leader: {why}")),
        Ok(_) | Err(InfoError::Permission(_)) => unsent("the consumer has no leader"),
    }
}

pub(super) fn consumer_of(ack_subject: &str) -> Option<ConsumerName> {
    let facts = AckFacts::parse(ack_subject)?;
    Some(ConsumerName { stream: facts.stream.into(), consumer: facts.consumer.into() })
}

/// The bytes are nats-server's (ADR-13 and ADR-15); it knows them by exact match.
fn request(order: AckPublish) -> Request {
    let payload = match order.verdict {
        Verdict::Ack => Bytes::from_static(b"+ACK"),
        Verdict::Progress => Bytes::from_static(b"+WPI"),
        Verdict::Nak(None) => Bytes::from_static(b"-NAK"),
        Verdict::Nak(Some(delay)) => format!("-NAK {{\"delay\":{}}}", delay.as_nanos()).into(),
        Verdict::Term(reason) if reason.is_empty() => Bytes::from_static(b"+TERM"),
        Verdict::Term(reason) => format!("+TERM {reason}").into(),
    };
    let by = order.by.map(|by| Deadline::new(by, clock::reading()));
    Request { subject: order.ack.0, payload, line: order.line, by }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::AckSubject;
    use std::time::Duration;

    fn payload(verdict: Verdict) -> Bytes {
        let ack = AckSubject("$JS.ACK.S.c.1.1.1.1.0".into());
        request(AckPublish { ack, verdict, line: None, by: None }).payload
    }

    #[test]
    fn verdicts_are_written_as_the_server_reads_them() {
        assert_eq!(payload(Verdict::Ack), "+ACK");
        assert_eq!(payload(Verdict::Progress), "+WPI");
        assert_eq!(payload(Verdict::Nak(None)), "-NAK");
        assert_eq!(
            payload(Verdict::Nak(Some(Duration::from_secs(2)))),
            "-NAK {\"delay\":2000000000}"
        );
        assert_eq!(payload(Verdict::Term(String::new())), "+TERM");
        assert_eq!(payload(Verdict::Term("bad json".into())), "+TERM bad json");
    }
}
