//! The work on one message, as the runner starts it and hears of its end.

use tokio::sync::watch;

use super::{captured::Captured, verdict::WorkEnd};

/// An order of the runner to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum JobOrder {
    /// Continue.
    Continue,
    /// End, with the time to end in order.
    End,
    /// End at once.
    Kill,
}

/// The end of a job.
#[derive(Debug)]
pub(super) struct JobEnd {
    pub(super) end: WorkEnd,
    /// The job has ended because it was ordered to.
    pub(super) is_ended: bool,
    /// Whether the place of the work was reached. `None`: nobody knows, or it is on this machine.
    pub(super) is_reached: Option<bool>,
    /// Standard output and standard error of a command. The body of an answer, and nothing.
    pub(super) output: Option<(Captured, Captured)>,
}

/// Waits until something is ordered that is at least this.
pub(super) async fn ordered(orders: &mut watch::Receiver<JobOrder>, least: JobOrder) {
    if orders.wait_for(|order| *order >= least).await.is_err() {
        // Nobody can order anything any more.
        std::future::pending().await
    }
}
