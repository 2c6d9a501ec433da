//! The plan of a worker, and the steps that the desk asks for. Pure.

use std::time::Duration;

use super::held::WorkOutcome;
use crate::{
    limits::MOST_MAX_BYTES,
    pb::{ConsumeKeep, ConsumeRequest, ConsumeStart, Delivery, consume_start::Holding, time},
};

/// The messages that a worker takes, and how.
#[derive(Debug, Clone)]
pub struct DeskPlan {
    /// Name of the stream.
    pub stream: String,
    /// Name of its consumer.
    pub consumer: String,
    /// The name of the worker, for operators.
    pub worker: String,
    /// The most messages at work, from 1 to 1000.
    pub jobs: u32,
    /// The number of messages after which the worker stops.
    pub max: Option<u64>,
    /// Whether to stop when nothing is left to take.
    pub until_empty: bool,
    /// How long leases outlive a stream. At least 3 s.
    pub grace: Duration,
    /// The longest lease. `None`: that of the proxy.
    pub lease: Option<Duration>,
    /// Decides how waits vary.
    pub seed: u64,
}

impl DeskPlan {
    /// The beginning of a stream, without its credit.
    pub(super) fn start(&self, beat: Duration) -> ConsumeStart {
        let Self { stream, consumer, worker, grace, lease, .. } = self;
        let keep =
            ConsumeKeep { grace: Some(time::duration(*grace)), at_most: lease.map(time::duration) };
        ConsumeStart {
            stream: stream.clone(),
            consumer: consumer.clone(),
            holding: Some(Holding::Keep(keep)),
            max_frame_bytes: MOST_MAX_BYTES,
            heartbeat: Some(time::duration(beat)),
            worker: worker.clone(),
            ..ConsumeStart::default()
        }
    }
}

/// Something to do.
#[derive(Debug)]
pub enum DeskStep {
    /// Open a stream.
    Open(u64),
    /// Send a frame on it.
    Send(u64, ConsumeRequest),
    /// Half-close it.
    HalfClose(u64),
    /// Drop it.
    Drop(u64),
    /// Begin to work on a message, under this key.
    Begin(u64, Box<Delivery>),
    /// End the work on the message of this key.
    EndWork(u64),
    /// A message has left the worker.
    Settled(SettledMessage),
    /// Tell people.
    Note(String),
}

/// A message that has left the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettledMessage {
    /// Its key. 0: no work has begun.
    pub key: u64,
    /// How it has left.
    pub outcome: WorkOutcome,
    /// Its subject.
    pub subject: String,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// Which attempt this was, from 1.
    pub attempt: u32,
    /// Why, for people. Empty for an Ack.
    pub why: String,
}
