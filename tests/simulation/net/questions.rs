//! The callers that wait for answers, by the number of the question.

use std::collections::BTreeMap;

use fetch_proxy::broker::ConsumerName;
use tokio::sync::oneshot;

use super::{super::jetstream::Connection, carried::Answer};

struct Question {
    wire: Connection,
    about: Option<ConsumerName>,
    tell: oneshot::Sender<Answer>,
}

#[derive(Default)]
pub(super) struct Questions(BTreeMap<u64, Question>);

impl Questions {
    /// Returns the place where the answer arrives.
    pub(super) fn ask(
        &mut self,
        number: u64,
        wire: Connection,
        about: Option<ConsumerName>,
    ) -> oneshot::Receiver<Answer> {
        let (tell, told) = oneshot::channel();
        self.0.insert(number, Question { wire, about, tell });
        told
    }

    pub(super) fn answer(&mut self, number: u64, answer: Answer) {
        if let Some(question) = self.0.remove(&number) {
            let _ = question.tell.send(answer);
        }
    }

    /// The consumer that a question is about.
    pub(super) fn about(&self, number: u64) -> Option<ConsumerName> {
        self.0.get(&number)?.about.clone()
    }

    /// Each caller that waits for an answer on this wire learns that there is none.
    pub(super) fn forget_wire(&mut self, wire: Connection) {
        self.0.retain(|_, question| question.wire != wire);
    }
}
