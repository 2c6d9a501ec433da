//! The end of a worker, as it is asked for: first politely, then by force. Settles nothing.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time};

/// Stops a worker. Its clones stop the same worker.
#[derive(Clone, Debug)]
pub struct Stop {
    /// How often it was asked for.
    asked: Arc<watch::Sender<u32>>,
}

impl Stop {
    pub(crate) fn new() -> Self {
        Self { asked: Arc::new(watch::Sender::new(0)) }
    }

    /// Takes no more messages, and lets handlers come to their end. A second call cancels the handlers, and gives their
    /// messages back.
    pub fn stop(&self) {
        self.asked.send_modify(|asked| *asked += 1);
    }

    /// Ends when no more messages are wanted.
    pub(crate) async fn asked(&self) {
        self.reaches(1).await;
    }

    /// Ends when handlers may not continue: at the second call, or `timeout` after the first.
    pub(crate) async fn forced(&self, timeout: Option<Duration>) {
        self.reaches(1).await;
        match timeout {
            Some(timeout) => drop(time::timeout(timeout, self.reaches(2)).await),
            None => self.reaches(2).await,
        }
    }

    async fn reaches(&self, count: u32) {
        // This struct has the sender, so the channel does not close.
        let _ = self.asked.subscribe().wait_for(|asked| *asked >= count).await;
    }
}
