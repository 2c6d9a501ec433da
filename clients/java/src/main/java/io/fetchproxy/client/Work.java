package io.fetchproxy.client;

import io.fetchproxy.v1.Delivery;

/**
 * Decodes a message, calls the handler, and makes the outcome. It must know nothing of leases.
 *
 * @param <T> the decoded payload
 */
final class Work<T> {
  /**
   * The end of the work.
   *
   * @param message the message, decoded if that was possible
   * @param outcome the settlement
   * @param error the error of the handler; null for none
   */
  record Done(Message<?> message, Outcome outcome, Throwable error) {}

  private final Options options;
  private final Decoder<T> decoder;
  private final Handler<T> handler;

  Work(Options options, Decoder<T> decoder, Handler<T> handler) {
    this.options = options;
    this.decoder = decoder;
    this.handler = handler;
  }

  /** Never throws: a parser may overflow its stack, and that of another worker would, too. */
  Done on(Delivery delivery) {
    Message<T> message;
    try {
      message = new Message<>(delivery, decoder.decode(delivery));
    } catch (Throwable undecodable) {
      var outcome = Outcome.term("the payload cannot be decoded: " + undecodable);
      return new Done(new Message<>(delivery, null), outcome, null);
    }
    try {
      HandlerTracer.Call call = () -> handler.handle(message);
      if (options.tracer == null) call.run();
      else options.tracer.trace(options.stream, options.consumer, message, call);
      return new Done(message, Outcome.ack(), null);
    } catch (Nak nak) {
      return new Done(message, Outcome.nak(nak.delay()), null);
    } catch (Term term) {
      return new Done(message, Outcome.term(term.getMessage()), null);
    } catch (Throwable failure) {
      return new Done(message, Outcome.failed(delivery.getDeliveryCount()), failure);
    }
  }
}
