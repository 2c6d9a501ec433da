//! Settling on a real JetStream: writes verdicts as the server reads them, and reads its answers.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;

use super::{
    delivery::AckFacts,
    info,
    request_mux::{Request, RequestAnswer, RequestMux, unsent},
    supervisor::Supervisor,
};
use crate::{
    broker::{AckKind, AckPublish, BrokerError, Confirmation, ConsumerName, Denial, InfoError},
    clock::{self, Deadline},
};

/// Settles as [`crate::broker::Broker::settle`] promises.
pub(super) async fn settle(
    mux: &Arc<RequestMux>,
    supervisor: &Supervisor,
    publishes: Vec<AckPublish>,
    confirmation: Confirmation,
    until: Instant,
) -> Vec<Result<(), BrokerError>> {
    let requests: Vec<Request> = publishes.into_iter().map(request).collect();
    if confirmation == Confirmation::Sent {
        let mut sent = Vec::with_capacity(requests.len());
        for request in &requests {
            let left = mux.send(request, None, until).await;
            sent.push(left.then_some(()).ok_or_else(|| unsent("the settling connection is gone")));
        }
        return sent;
    }
    let answers = mux.ask(&requests, until).await;
    let mut settled = Vec::with_capacity(answers.len());
    // A consumer is looked at once, however many of its deliveries nobody answers for.
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
                    None => why_nobody_answers(mux, supervisor, &name, until).await,
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
    mux: &Arc<RequestMux>,
    supervisor: &Supervisor,
    name: &ConsumerName,
    until: Instant,
) -> BrokerError {
    match info::read(mux, supervisor, name, until).await {
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
fn request(publish: AckPublish) -> Request {
    let payload = match publish.kind {
        AckKind::Ack => Bytes::from_static(b"+ACK"),
        AckKind::Progress => Bytes::from_static(b"+WPI"),
        AckKind::Nak(None) => Bytes::from_static(b"-NAK"),
        AckKind::Nak(Some(delay)) => format!("-NAK {{\"delay\":{}}}", delay.as_nanos()).into(),
        AckKind::Term(reason) if reason.is_empty() => Bytes::from_static(b"+TERM"),
        AckKind::Term(reason) => format!("+TERM {reason}").into(),
    };
    let by = publish.by.map(|by| Deadline::new(by, clock::reading()));
    Request { subject: publish.ack.0, payload, line: publish.confirm_group, by }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::AckSubject;
    use std::time::Duration;

    fn payload(kind: AckKind) -> Bytes {
        let ack = AckSubject("$JS.ACK.S.c.1.1.1.1.0".into());
        request(AckPublish { ack, kind, confirm_group: None, by: None }).payload
    }

    #[test]
    fn verdicts_are_written_as_the_server_reads_them() {
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
