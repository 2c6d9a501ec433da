package io.fetchproxy.client;

/** Runs each handler inside a span. */
@FunctionalInterface
public interface HandlerTracer {
  /** The call of the handler. */
  @FunctionalInterface
  interface Call {
    /**
     * Runs the handler.
     *
     * @throws Exception the failure of the handler
     */
    void run() throws Exception;
  }

  /**
   * Runs the handler once, and throws what it throws.
   *
   * @param stream the stream of the worker
   * @param consumer the consumer of the worker
   * @param message the message
   * @param handler the call of the handler
   * @throws Exception the failure of the handler
   */
  void trace(String stream, String consumer, Message<?> message, Call handler) throws Exception;
}
