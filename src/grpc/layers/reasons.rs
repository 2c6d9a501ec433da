//! Gives errors that tonic makes itself the reasons of our table: a request that cannot be decoded, one that
//! is too large, an unknown method. Every status of ours then has a reason. A status that has its reason
//! already passes unchanged.

use std::future::Future;

use futures_util::TryFutureExt as _;
use http::{HeaderMap, Request, Response};
use tonic::{Code, Status};

use crate::{
    api_error::ApiError,
    grpc::{call::Call, to_status::to_status},
    net::{InnerService, Middleware, Next},
    reason::{REASON_TRAILER, Reason},
};

/// A layer that gives every error a reason; see the [module](self).
#[derive(Debug, Clone, Copy)]
pub(in crate::grpc) struct ErrorReasons;

impl<S, R, B> Middleware<Request<R>, S> for ErrorReasons
where
    S: InnerService<Request<R>, Response = Response<B>>,
    R: Send + 'static,
    B: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    fn handle(
        &self,
        request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static {
        let ours = Call::kind_of(&request).is_ours();
        next.run(request).map_ok(move |response| match renamed(response.headers(), ours) {
            None => response,
            Some(status) => status.into_http(),
        })
    }
}

/// Our status for an error that tonic made itself. `ours`: it was a call of our service.
fn renamed(headers: &HeaderMap, ours: bool) -> Option<Status> {
    // Most answers have no status here.
    if !headers.contains_key(Status::GRPC_STATUS) || headers.contains_key(REASON_TRAILER) {
        return None;
    }
    // Errors that tonic finds before a handler runs are answered in the headers.
    let status = Status::from_header_map(headers)?;
    let is = |codes: &[Code]| codes.contains(&status.code());
    let reason = if is(&[Code::Unimplemented]) {
        Reason::Unsupported
    } else if ours && is(&[Code::OutOfRange, Code::ResourceExhausted]) {
        Reason::RequestTooLarge
    } else if ours && is(&[Code::Internal, Code::InvalidArgument, Code::Unknown]) {
        Reason::Malformed
    } else {
        return None;
    };
    let message = match (reason, status.message()) {
        (Reason::Unsupported, "") => "there is no such method",
        (_, message) => message,
    };
    Some(to_status(&ApiError::Foreign(reason, message.to_owned())))
}
