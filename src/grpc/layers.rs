//! The layers between a connection and the handlers of the service. Each is a middleware of its own and
//! knows none of the others; `server` composes them.

mod callers;
mod delivery;
mod held_body;
mod limits;
mod metered;
mod protocol;
mod quotas;
mod reasons;
mod strangers;
mod trace;

pub(super) use self::{
    callers::AcceptCallers, delivery::AnswerDelivery, limits::CallLimiter, metered::MeterCalls,
    protocol::GrpcOnly, quotas::PrincipalQuotas, reasons::ErrorReasons, trace::CallTrace,
};
