//! Makes a gRPC status of an error: code, message, error details and trailers. Decides nothing: the code,
//! the promise and the wait come from the table in `reason`.

use std::time::Duration;

use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    api_error::ApiError,
    lessor::Error,
    reason::{DOMAIN, PUSHBACK_TRAILER, REASON_TRAILER, Reason},
};

/// The status of a call that failed with this error.
pub(crate) fn to_status(error: &ApiError) -> Status {
    let reason = error.reason();
    let mut details = ErrorDetails::with_error_info(reason.name(), DOMAIN, error.metadata());
    match error {
        ApiError::Field { field, why } => {
            details.add_bad_request_violation(field, why);
        }
        ApiError::Lessor(Error::StreamNotFound(name)) => {
            details.set_resource_info("stream", &*name.stream, "", error.message());
        }
        ApiError::Lessor(Error::ConsumerNotFound(name)) => {
            details.set_resource_info("consumer", name.to_string(), "", error.message());
        }
        ApiError::Lessor(Error::ConsumerUnsuitable { name, property }) => {
            let kind = property.name();
            details.add_precondition_failure_violation(kind, name.to_string(), error.message());
        }
        ApiError::CallLimit(..)
        | ApiError::WaiterLimit(..)
        | ApiError::ByteLimit(..)
        | ApiError::ConnectionLimit(_)
        | ApiError::Lessor(
            Error::LeaseLimit(_) | Error::ConsumerLeaseLimit(_) | Error::WaiterLimit(_),
        ) => {
            details.add_quota_failure_violation("replica", error.message());
        }
        ApiError::OverLimit(over) => {
            let subject = format!("principal:{}", over.principal);
            details.add_quota_failure_violation(subject, error.message());
        }
        ApiError::TokenInvalid
        | ApiError::KeyUnknown
        | ApiError::OwnerUnreachable { .. }
        | ApiError::Relayed { .. }
        | ApiError::RequestTimeout(_)
        | ApiError::StreamSilent(..)
        | ApiError::Foreign(..)
        | ApiError::Unauthenticated(_)
        | ApiError::AuthUnavailable(_)
        | ApiError::NotAllowed(_)
        | ApiError::Lessor(_) => {}
    }
    status(reason, error.message(), error.retry_after(), details)
}

fn status(
    reason: Reason,
    message: String,
    retry_after: Option<Duration>,
    mut details: ErrorDetails,
) -> Status {
    let mut trailers = MetadataMap::new();
    // Reasons and numbers are ASCII, so both always parse.
    if let Ok(name) = reason.name().parse() {
        trailers.insert(REASON_TRAILER, name);
    }
    if let Some(delay) = retry_after {
        details.set_retry_info(Some(delay));
        // Rounded up, because a repeat that comes earlier is refused again.
        if let Ok(milliseconds) = delay.as_micros().div_ceil(1000).to_string().parse() {
            trailers.insert(PUSHBACK_TRAILER, milliseconds);
        }
    }
    Status::with_error_details_and_metadata(
        Code::from(reason.code() as i32),
        message,
        details,
        trailers,
    )
}
