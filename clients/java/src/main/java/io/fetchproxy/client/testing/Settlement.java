package io.fetchproxy.client.testing;

import java.time.Duration;

/** How a worker has settled one attempt. Settlements with the same content are equal. */
public sealed interface Settlement {
  /** The message is done. */
  record Ack() implements Settlement {}

  /**
   * The message must come back.
   *
   * @param delay the delay, for which the fake does not wait
   */
  record Nak(Duration delay) implements Settlement {}

  /**
   * The message must not come back.
   *
   * @param reason the reason
   */
  record Term(String reason) implements Settlement {}
}
