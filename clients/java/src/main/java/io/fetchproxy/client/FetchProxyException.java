package io.fetchproxy.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.fetchproxy.v1.SettleError;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.Map;
import java.util.Optional;
import java.util.Set;

/** A call, or a part of a call, has failed. The reason promises what has and has not happened. */
public final class FetchProxyException extends RuntimeException {
  private static final long serialVersionUID = 1;

  /** With these codes the same call would be refused again. */
  private static final Set<Status.Code> REFUSALS =
      Set.of(
          Status.Code.INVALID_ARGUMENT,
          Status.Code.NOT_FOUND,
          Status.Code.FAILED_PRECONDITION,
          Status.Code.PERMISSION_DENIED,
          Status.Code.UNAUTHENTICATED,
          Status.Code.UNIMPLEMENTED);

  /** The codes of the reasons of a settlement, which come without a code. */
  private static final Map<String, Status.Code> CODES =
      Map.ofEntries(
          Map.entry("TOKEN_INVALID", Status.Code.INVALID_ARGUMENT),
          Map.entry("INVALID_FIELD", Status.Code.INVALID_ARGUMENT),
          Map.entry("KEY_UNKNOWN", Status.Code.UNAVAILABLE),
          Map.entry("LEASE_EXPIRED", Status.Code.FAILED_PRECONDITION),
          Map.entry("LEASE_SETTLED", Status.Code.FAILED_PRECONDITION),
          Map.entry("LEASE_BUSY", Status.Code.ABORTED),
          Map.entry("UNAUTHENTICATED", Status.Code.UNAUTHENTICATED),
          Map.entry("AUTH_UNAVAILABLE", Status.Code.UNAVAILABLE),
          Map.entry("NOT_ALLOWED", Status.Code.PERMISSION_DENIED),
          Map.entry("NATS_PERMISSION", Status.Code.PERMISSION_DENIED),
          Map.entry("RATE_LIMIT", Status.Code.RESOURCE_EXHAUSTED),
          Map.entry("NATS_UNAVAILABLE", Status.Code.UNAVAILABLE),
          Map.entry("DRAINING", Status.Code.UNAVAILABLE),
          Map.entry("OWNER_UNREACHABLE", Status.Code.UNAVAILABLE),
          Map.entry("SETTLE_UNCONFIRMED", Status.Code.DEADLINE_EXCEEDED),
          Map.entry("JETSTREAM_DENIED", Status.Code.FAILED_PRECONDITION));

  private final String reason;
  private final Status.Code code;
  private final String text;
  private final transient Duration retryDelay;
  private final transient Map<String, String> metadata;
  private final boolean repeatable;

  FetchProxyException(
      String reason,
      Status.Code code,
      String text,
      Duration retryDelay,
      Map<String, String> metadata,
      boolean repeatable,
      Throwable cause) {
    super(reason + ": " + text, cause);
    this.reason = reason;
    this.code = code;
    this.text = text;
    this.retryDelay = retryDelay;
    this.metadata = Map.copyOf(metadata);
    this.repeatable = repeatable;
  }

  /** The failure of a whole call. Without a reason of the proxy, only the code counts. */
  static FetchProxyException of(StatusRuntimeException error) {
    Status.Code code = error.getStatus().getCode();
    String reason = code.name();
    Map<String, String> metadata = Map.of();
    Duration delay = null;
    try {
      for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          var info = detail.unpack(ErrorInfo.class);
          if (info.getDomain().equals("fetchproxy")) {
            reason = info.getReason();
            metadata = info.getMetadataMap();
          }
        } else if (detail.is(RetryInfo.class)) {
          delay = Times.of(detail.unpack(RetryInfo.class).getRetryDelay());
        }
      }
    } catch (InvalidProtocolBufferException malformed) {
      // Treat it as missing.
    }
    String description = error.getStatus().getDescription();
    var text = new StringBuilder(description == null ? "no description" : description);
    // The causes of a failed connection are not in its description.
    for (Throwable cause = error.getCause(); cause != null; cause = cause.getCause()) {
      text.append(": ").append(cause.getMessage());
    }
    boolean repeatable = !REFUSALS.contains(code) && !reason.equals("REQUEST_TOO_LARGE");
    return new FetchProxyException(
        reason, code, text.toString(), delay, metadata, repeatable, error);
  }

  /** The failure of one settlement. */
  static FetchProxyException of(SettleError error) {
    String reason = error.getReason();
    Duration delay = error.hasRetryDelay() ? Times.of(error.getRetryDelay()) : null;
    Status.Code code = CODES.getOrDefault(reason, Status.Code.UNKNOWN);
    boolean repeatable = delay != null || reason.equals("SETTLE_UNCONFIRMED");
    String text = error.getMessage();
    return new FetchProxyException(
        reason, code, text, delay, error.getMetadataMap(), repeatable, null);
  }

  /** A lease that ends by the clock of this worker, or by its own will. */
  static FetchProxyException lost(String text) {
    var code = Status.Code.FAILED_PRECONDITION;
    return new FetchProxyException("LEASE_EXPIRED", code, text, null, Map.of(), false, null);
  }

  /**
   * Returns the reason.
   *
   * @return a reason of the page "Errors", or the name of the status code if the proxy gave none
   */
  public String reason() {
    return reason;
  }

  /**
   * Returns the status code.
   *
   * @return for one settlement, the code that a call for its token alone would have
   */
  public Status.Code code() {
    return code;
  }

  /**
   * Returns a text for people. Do not parse it: it may change.
   *
   * @return the text, without the reason
   */
  public String detail() {
    return text;
  }

  /**
   * Returns how long the proxy asks to wait before a repeat.
   *
   * @return empty if a wait does not help, or is not needed
   */
  public Optional<Duration> retryDelay() {
    return Optional.ofNullable(retryDelay);
  }

  /**
   * Returns the metadata of the reason.
   *
   * @return empty if the proxy gave no reason
   */
  public Map<String, String> metadata() {
    return metadata;
  }

  /**
   * Returns whether the same call may succeed later.
   *
   * @return false if a person must act first
   */
  public boolean isRepeatable() {
    return repeatable;
  }
}
