//! The names of attributes, and their values that do not change. The conventions for RPC and messaging still
//! change: these names are those of open-telemetry/semantic-conventions at revision 384d661.

/// The source of all spans.
pub(super) const SERVICE_NAME: &str = "service.name";
pub(super) const SERVICE_VERSION: &str = "service.version";
pub(super) const SERVICE_INSTANCE_ID: &str = "service.instance.id";

/// A call.
pub(super) const RPC_SYSTEM_NAME: &str = "rpc.system.name";
pub(super) const RPC_SYSTEM_GRPC: &str = "grpc";
pub(super) const RPC_METHOD: &str = "rpc.method";
/// The method of a call that we do not serve. Its name would be any text of the caller.
pub(super) const RPC_METHOD_OTHER: &str = "_OTHER";
pub(super) const RPC_STATUS_CODE: &str = "rpc.status_code";
pub(super) const SERVER_ADDRESS: &str = "server.address";
pub(super) const SERVER_PORT: &str = "server.port";
pub(super) const NETWORK_PEER_ADDRESS: &str = "network.peer.address";
pub(super) const NETWORK_PEER_PORT: &str = "network.peer.port";
/// A reason of ours. A call that failed without a reason has its code instead.
pub(super) const ERROR_TYPE: &str = "error.type";

/// Messages. The registry of systems has no NATS, and allows other values.
pub(super) const MESSAGING_SYSTEM: &str = "messaging.system";
pub(super) const MESSAGING_SYSTEM_NATS: &str = "nats";
pub(super) const MESSAGING_OPERATION_TYPE: &str = "messaging.operation.type";
pub(super) const MESSAGING_RECEIVE: &str = "receive";
pub(super) const MESSAGING_SETTLE: &str = "settle";
pub(super) const MESSAGING_OPERATION_NAME: &str = "messaging.operation.name";
pub(super) const MESSAGING_FETCH: &str = "fetch";
pub(super) const MESSAGING_DESTINATION_NAME: &str = "messaging.destination.name";
pub(super) const MESSAGING_CONSUMER_GROUP_NAME: &str = "messaging.consumer.group.name";
pub(super) const MESSAGING_BATCH_MESSAGE_COUNT: &str = "messaging.batch.message_count";
pub(super) const MESSAGING_CLIENT_ID: &str = "messaging.client.id";
/// A link has the sequence of its message in the stream, and the number of the attempt.
pub(super) const MESSAGING_MESSAGE_ID: &str = "messaging.message.id";
pub(super) const MESSAGING_NATS_DELIVERY_COUNT: &str = "messaging.nats.delivery_count";

/// Ours.
pub(super) const PRINCIPAL: &str = "fetchproxy.principal";
pub(super) const ROUTE: &str = "fetchproxy.route";
pub(super) const REPLICA: &str = "fetchproxy.replica";
pub(super) const EMPTY_FETCH_REASON: &str = "fetchproxy.empty_reason";

/// The names of the status codes of gRPC, by their numbers.
const RPC_STATUS_NAMES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The name of a status code.
pub(super) fn code_name(code: i32) -> &'static str {
    let known = usize::try_from(code).ok().and_then(|code| RPC_STATUS_NAMES.get(code));
    known.copied().unwrap_or("UNKNOWN")
}

/// Whether a status code is an error of the server. Other codes tell the client about its request.
pub(super) fn is_server_error(code: i32) -> bool {
    let errors =
        ["UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"];
    errors.contains(&code_name(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_has_its_name_and_only_some_are_errors_of_the_server() {
        assert_eq!(
            [0, 1, 9, 14, 16].map(code_name),
            ["OK", "CANCELLED", "FAILED_PRECONDITION", "UNAVAILABLE", "UNAUTHENTICATED",]
        );
        assert_eq!([17, -1].map(code_name), ["UNKNOWN", "UNKNOWN"]);
        let errors: Vec<i32> = (0..17).filter(|code| is_server_error(*code)).collect();
        assert_eq!(errors, [2, 4, 12, 13, 14, 15]);
    }
}
