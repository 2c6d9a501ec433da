//! The layers between a connection and the handlers of the service. Each is a middleware of its own and
//! knows none of the others; `server` composes them. They share the record of a call.

mod callers;
mod delivery;
mod held_body;
mod limits;
mod protocol;
mod quotas;
mod reasons;
mod record;
mod strangers;

pub use self::delivery::{FrameHold, FrameHolds};
pub(super) use self::{
    callers::AcceptCallers, delivery::AnswerDelivery, limits::CallLimiter, protocol::GrpcOnly,
    quotas::PrincipalQuotas, reasons::ErrorReasons, record::RecordCalls,
};
