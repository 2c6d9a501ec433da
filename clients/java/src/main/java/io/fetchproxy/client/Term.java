package io.fetchproxy.client;

/** A handler throws it for a permanent failure: the message does not come back. */
public final class Term extends RuntimeException {
  private static final long serialVersionUID = 1;

  /**
   * Makes a Term.
   *
   * @param reason the reason, which is cut to 1 KiB of UTF-8
   */
  public Term(String reason) {
    super(reason);
  }

  /**
   * Makes a Term with a cause.
   *
   * @param reason the reason, which is cut to 1 KiB of UTF-8
   * @param cause the failure behind it
   */
  public Term(String reason, Throwable cause) {
    super(reason, cause);
  }
}
