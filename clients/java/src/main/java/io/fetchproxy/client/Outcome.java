package io.fetchproxy.client;

import com.google.protobuf.ByteString;
import io.fetchproxy.v1.AckAction;
import io.fetchproxy.v1.NakAction;
import io.fetchproxy.v1.Rejected;
import io.fetchproxy.v1.RejectedCause;
import io.fetchproxy.v1.Settlement;
import io.fetchproxy.v1.TermAction;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.function.Function;

/**
 * How a message is settled. One settlement that the proxy refuses would fail the whole call, so
 * each value is lowered to its limit.
 *
 * @param action without the name of the message
 * @param event the event when the settlement is confirmed; null for none
 */
record Outcome(Settlement.Builder action, Function<Message<?>, Event> event) {
  private static final Duration LONGEST_DELAY = Duration.ofHours(24);

  /** The longest reason of a Term, in bytes. */
  private static final int LONGEST_REASON = 1_024;

  private static final Duration FIRST_DELAY = Duration.ofSeconds(5);
  private static final Duration LAST_DELAY = Duration.ofMinutes(5);

  static Outcome ack() {
    return new Outcome(
        Settlement.newBuilder().setAck(AckAction.getDefaultInstance()), Event.Acked::new);
  }

  static Outcome nak(Duration delay) {
    Duration lowered = limited(delay);
    return new Outcome(nakAction(lowered), message -> new Event.Nacked(message, lowered));
  }

  static Outcome term(String reason) {
    String cut = cut(String.valueOf(reason));
    var term = TermAction.newBuilder().setReason(cut);
    return new Outcome(
        Settlement.newBuilder().setTerm(term), message -> new Event.Termed(message, cut));
  }

  /** For a message that nobody works on any more. */
  static Outcome returned() {
    return new Outcome(nakAction(Duration.ZERO), Event.Returned::new);
  }

  /** Another worker may accept larger answers. Nobody can read what its codec refuses. */
  static Outcome ofRejected(Rejected rejected) {
    boolean tooLarge = rejected.getCause() == RejectedCause.REJECTED_CAUSE_TOO_LARGE;
    Outcome outcome = tooLarge ? nak(Duration.ofSeconds(60)) : term(rejected.getDetail());
    return new Outcome(outcome.action, null); // The event "rejected" was told already.
  }

  /** The delay after an error of a handler: 5 s, doubled by each attempt, at most 5 min. */
  static Outcome failed(int attempt) {
    int doublings = (int) Times.clamp(attempt - 1L, 0, 10);
    Duration delay = FIRST_DELAY.multipliedBy(1L << doublings);
    return nak(delay.compareTo(LAST_DELAY) < 0 ? delay : LAST_DELAY);
  }

  static Duration limited(Duration delay) {
    if (delay == null || delay.isNegative()) return Duration.ZERO;
    return delay.compareTo(LONGEST_DELAY) > 0 ? LONGEST_DELAY : delay;
  }

  /** Cuts between two characters. */
  static String cut(String reason) {
    byte[] bytes = reason.getBytes(StandardCharsets.UTF_8);
    int end = Math.min(bytes.length, LONGEST_REASON);
    while (end < bytes.length && (bytes[end] & 0xC0) == 0x80) end--;
    return ByteString.copyFrom(bytes, 0, end).toStringUtf8();
  }

  private static Settlement.Builder nakAction(Duration delay) {
    return Settlement.newBuilder().setNak(NakAction.newBuilder().setDelay(Times.duration(delay)));
  }
}
