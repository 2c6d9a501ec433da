package io.fetchproxy.client;

import java.time.Duration;

/** A handler throws it for a temporary failure: the message comes back after the delay. */
public final class Nak extends RuntimeException {
  private static final long serialVersionUID = 1;

  private final transient Duration delay;

  /**
   * Makes a Nak.
   *
   * @param delay the time before the message comes back; longer than 24 h is lowered to 24 h
   */
  public Nak(Duration delay) {
    this(delay, null);
  }

  /**
   * Makes a Nak with a cause.
   *
   * @param delay the time before the message comes back; longer than 24 h is lowered to 24 h
   * @param cause the failure behind it
   */
  public Nak(Duration delay, Throwable cause) {
    super("Nak, with a delay of " + delay, cause);
    this.delay = delay;
  }

  /**
   * Returns the delay.
   *
   * @return the time before the message comes back
   */
  public Duration delay() {
    return delay;
  }
}
