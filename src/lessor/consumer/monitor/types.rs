//! The words of a monitor: the events that it hears of, and the steps that it decides.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::broker::{ConsumerInfo, Leader};

/// The part of CONSUMER.INFO that the monitor decides by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ConsumerView {
    /// When the consumer was made, as JetStream writes it (RFC 3339). A consumer that was deleted and made
    /// again has another time.
    pub created: Arc<str>,
    /// The server that leads the consumer, and since when, as far as INFO tells.
    pub leader: Leader,
    /// `leader` changes with every change of leader and with every start of the leader.
    pub leader_shows: bool,
    /// The consumer's state has copies on several servers.
    pub replicated: bool,
    /// The ack wait. INFO is asked at least three times in it.
    pub ack_wait: Duration,
    /// The highest consumer sequence that was delivered.
    pub delivered: u64,
    /// The highest stream sequence that was delivered.
    pub delivered_stream: u64,
}

impl ConsumerView {
    /// Reads INFO.
    pub fn of(info: &ConsumerInfo) -> Self {
        Self {
            created: info.created.clone(),
            leader: info.leader,
            leader_shows: info.leader_shows,
            replicated: info.replicas > 1,
            ack_wait: info.ack_wait,
            delivered: info.delivered,
            delivered_stream: info.delivered_stream,
        }
    }

    /// Another server can come to lead the consumer, or its server can start again, while our connections
    /// live on.
    pub fn is_led_elsewhere(&self) -> bool {
        self.replicated || !self.leader_shows
    }
}

/// The answer to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InfoAnswer {
    /// INFO was read, and leases can be kept on this consumer.
    Read(ConsumerView),
    /// INFO was read, and no lease can be kept on this consumer, which was made then.
    Unsuitable {
        /// When it was made, as in [`ConsumerView::created`].
        created: Arc<str>,
    },
    /// There is no such consumer, or no such stream.
    Gone,
    /// Our rights do not cover the question.
    Forbidden,
    /// Nobody answered in time, or the answer says that INFO is not to be had now.
    Silent,
}

/// The wishes of the consumer's callers at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallerWants {
    /// Somebody waits for messages.
    pub waiting: bool,
    /// Somebody waits for messages, and no pull is open.
    pub pull: bool,
}

/// Something to be done. Steps are done one by one, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MonitorStep {
    /// Ask INFO.
    Ask,
    /// Drop the open question: its answer may be too old.
    Cancel,
    /// Use the configuration that was just read, for what follows.
    Adopt,
    /// The consumer was made again under its name: end the leases of the old one, and forget what was
    /// held against it.
    MadeAgain,
    /// The consumer is gone: end its leases.
    EndLeases,
    /// JetStream counts the deliveries of this consumer from the beginning again: end all leases that were
    /// granted before, and give the consumer a new id in the lease table.
    Void,
    /// The server may have forgotten what it promised from then on, or a moment before.
    Distrust {
        /// Since when.
        since: Instant,
        /// The signs that INFO has shown, if it was INFO.
        signs: LeaderSigns,
    },
    /// The new leader knows deliveries up to this consumer sequence. Leases of later ones are lost.
    LoseAfter(u64),
    /// INFO has named this leader. Leases that it has not given have lost their trust before.
    Lead(Leader),
    /// Settle nothing, release nothing and keep nothing alive until [`MonitorStep::Trust`].
    Doubt,
    /// It is known who leads: settle again.
    Trust,
    /// Tell the other replicas, and hold back what arrives until they have answered.
    Announce {
        /// When the consumer was made.
        created: Arc<str>,
        /// The highest consumer sequence that INFO knew, or the one that has arrived.
        delivered: u64,
        /// The delivery with consumer sequence 1 has arrived here.
        began: bool,
        /// Consumer sequences went down.
        again: bool,
        /// How often they went down, as far as is known here.
        counting: u64,
    },
    /// INFO was read for the first time on this connection.
    ReadHere {
        /// JetStream has delivered something that did not arrive here: from this stream sequence on.
        missing_from: Option<u64>,
    },
    /// Answer the replicas that wait until INFO has been read.
    AnswerReplicas,
    /// End the task: the last answer says why.
    Stop,
}

/// Signs that a leader may have forgotten promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LeaderSigns {
    /// Another server leads the consumer, or the same one has started again.
    pub another: bool,
    /// Somebody has found no leader, and INFO does not show whether the leader was away.
    pub missed: bool,
    /// INFO knows fewer deliveries than were known when it was asked.
    pub forgotten: bool,
}

impl LeaderSigns {
    /// Whether there is any.
    pub fn any(self) -> bool {
        self.another || self.missed || self.forgotten
    }
}
