package io.fetchproxy.client;

/**
 * The work on one message. It runs in a thread of its own, which is interrupted when the lease of
 * the message is lost.
 *
 * @param <T> the decoded payload
 */
@FunctionalInterface
public interface Handler<T> {
  /**
   * Does the work. A return is an Ack.
   *
   * @param message the message
   * @throws Nak if the message must come back
   * @throws Term if the message must not come back
   * @throws Exception any other failure: the message comes back, later at each attempt
   */
  void handle(Message<T> message) throws Exception;
}
