//! The callers that wait for answers, by the number of the question.

use std::collections::BTreeMap;

use tokio::sync::oneshot;

use super::{super::jetstream::Connection, carried::Answer};

#[derive(Default)]
pub(super) struct Questions(BTreeMap<u64, (Connection, oneshot::Sender<Answer>)>);

impl Questions {
    pub(super) fn ask(&mut self, number: u64, wire: Connection) -> oneshot::Receiver<Answer> {
        let (tell, told) = oneshot::channel();
        self.0.insert(number, (wire, tell));
        told
    }

    pub(super) fn answer(&mut self, number: u64, answer: Answer) {
        if let Some((_, waiting)) = self.0.remove(&number) {
            let _ = waiting.send(answer);
        }
    }

    /// Forgets a question. `true`: it had no answer.
    pub(super) fn forget(&mut self, number: u64) -> bool {
        self.0.remove(&number).is_some()
    }

    /// Each caller that waits for an answer on this wire learns that there is none.
    pub(super) fn forget_wire(&mut self, wire: Connection) {
        self.0.retain(|_, (on, _)| *on != wire);
    }
}
