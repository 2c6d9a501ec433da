//! Reflection of the contract, for tools that have no copy of it.

use tonic::service::Routes;

use crate::pb;

/// Longest request of reflection, in bytes. A request is a name.
const MAX_REFLECTION_REQUEST_BYTES: usize = 16 * 1024;

/// The contract built into this program cannot be read: a bug.
#[derive(Debug, thiserror::Error)]
#[error("the contract cannot be reflected: {0}")]
pub struct ContractError(#[from] tonic_reflection::server::Error);

/// These routes, and reflection.
///
/// # Errors
/// See [`ContractError`].
pub(super) fn reflected(routes: Routes) -> Result<Routes, ContractError> {
    let (v1, v1alpha) = (reflection().build_v1()?, reflection().build_v1alpha()?);
    let routes = routes.add_service(v1.max_decoding_message_size(MAX_REFLECTION_REQUEST_BYTES));
    Ok(routes.add_service(v1alpha.max_decoding_message_size(MAX_REFLECTION_REQUEST_BYTES)))
}

/// Reflection of the contract. It includes the error details, which grpcurl would show as base64 otherwise.
fn reflection<'b>() -> tonic_reflection::server::Builder<'b> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
