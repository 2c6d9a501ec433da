package io.fetchproxy.client.testing;

import com.google.protobuf.Duration;
import io.grpc.Status;

/** The reasons of the contract. */
final class Reasons {
  /** The wait before a repeat. A real proxy asks for more, but a test must not wait. */
  static final Duration WAIT = Duration.newBuilder().setNanos(10_000_000).build();

  private Reasons() {}

  static Status.Code codeOf(String reason) {
    return switch (reason) {
      case "INVALID_FIELD", "TOKEN_INVALID", "MALFORMED" -> Status.Code.INVALID_ARGUMENT;
      case "STREAM_NOT_FOUND", "CONSUMER_NOT_FOUND" -> Status.Code.NOT_FOUND;
      case "CONSUMER_UNSUITABLE", "LEASE_EXPIRED", "LEASE_SETTLED", "JETSTREAM_DENIED" ->
          Status.Code.FAILED_PRECONDITION;
      case "LEASE_BUSY" -> Status.Code.ABORTED;
      case "UNAUTHENTICATED" -> Status.Code.UNAUTHENTICATED;
      case "NOT_ALLOWED", "NATS_PERMISSION" -> Status.Code.PERMISSION_DENIED;
      case "SETTLE_UNCONFIRMED", "STREAM_SILENT" -> Status.Code.DEADLINE_EXCEEDED;
      case "UNSUPPORTED" -> Status.Code.UNIMPLEMENTED;
      case "CONSUMER_BUSY",
          "RATE_LIMIT",
          "LEASE_LIMIT",
          "WAITER_LIMIT",
          "CALL_LIMIT",
          "BYTE_LIMIT",
          "CONNECTION_LIMIT",
          "REQUEST_TOO_LARGE" ->
          Status.Code.RESOURCE_EXHAUSTED;
      case "KEY_UNKNOWN",
          "CONSUMER_SUSPECTED",
          "AUTH_UNAVAILABLE",
          "REQUEST_TIMEOUT",
          "NATS_UNAVAILABLE",
          "DRAINING",
          "OWNER_UNREACHABLE" ->
          Status.Code.UNAVAILABLE;
      default -> throw new IllegalArgumentException("no reason of the contract: " + reason);
    };
  }

  /** Whether the proxy asks to wait before a repeat. */
  static boolean isWorthAWait(String reason) {
    return switch (codeOf(reason)) {
      case UNAVAILABLE, ABORTED -> true;
      case RESOURCE_EXHAUSTED -> !reason.equals("REQUEST_TOO_LARGE");
      default -> false;
    };
  }
}
