//! The task behind one consumer: machines that decide, parts that hold, and a loop that performs.
//!
//! ```text
//!            INFO is read         the inbox is open         the connection is lost
//!  LEARNING ─────────────▶ KNOWN ──────────────────▶ PULLING ─────────────────────▶ LEARNING
//!     │ no such consumer (after a second question), unsuitable, no rights: callers are told, the task ends
//! ```
//! The machines decide:
//! - The [`monitor`] decides who leads the consumer, and whether it may be settled and pulled from.
//! - The pump ([`crate::pump`]) decides how much is pulled, and who gets it.
//! - The [`quarantine`] decides which connection the consumer is on after a break.
//!
//! The parts hold: `leases` holds the spec and the leases in the table. `callers` holds the replies, and
//! `subscription` the inbox. `announcer` holds back arrivals until the other replicas know. `info` holds the
//! open question, and `poison` the search.
//!
//! How the loop in `task` drives them, with `performer` to act. Each turn does four things:
//! 1. *Prepare*: do the steps of the monitor, ask INFO when it is due, and open an inbox.
//! 2. *Perform*: do the steps of the pump until it has nothing more to do: pull, answer, give back.
//! 3. *Wait* for one event, or for the earliest deadline of the parts. If several events are there, their
//!    order is: the end of the lessor, a drain, the answer to INFO, the answers of the other replicas.
//!    Then follow the end of a search, the connection, deliveries, permits, commands, and the deadline.
//! 4. *Take* the event: tell the machines, and do the steps of the monitor at once. Then take all commands
//!    that have come by now, so that a flood of deliveries holds up no caller.

mod announcer;
mod callers;
mod described;
mod handle;
mod info;
mod leases;
pub mod monitor;
mod open_flows;
mod performer;
mod poison;
pub mod quarantine;
mod send_bound;
mod sharing;
mod single_answer;
mod subscription;
mod task;

pub use self::handle::{DeliveryGuard, TaskState};
pub(super) use self::{
    handle::{ConsumerCommand, ConsumerHandle, FetchAnswer, SpecQuestion, Ticket},
    task::ConsumerTask,
};
