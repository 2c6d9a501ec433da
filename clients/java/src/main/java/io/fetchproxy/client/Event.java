package io.fetchproxy.client;

import java.time.Duration;

/** An event of a worker. Each kind of event is a record with the fields that it has. */
public sealed interface Event {
  /**
   * Returns the name, which is the same in all languages.
   *
   * @return for example {@code acked}
   */
  String name();

  /** The worker begins. */
  record Ready() implements Event {
    @Override
    public String name() {
      return "ready";
    }
  }

  /**
   * The proxy has confirmed the Ack.
   *
   * @param message the message
   */
  record Acked(Message<?> message) implements Event {
    @Override
    public String name() {
      return "acked";
    }
  }

  /**
   * The proxy has confirmed the Nak.
   *
   * @param message the message
   * @param delay the delay of the Nak
   */
  record Nacked(Message<?> message, Duration delay) implements Event {
    @Override
    public String name() {
      return "nacked";
    }
  }

  /**
   * The proxy has confirmed the Term.
   *
   * @param message the message
   * @param reason the reason of the Term
   */
  record Termed(Message<?> message, String reason) implements Event {
    @Override
    public String name() {
      return "termed";
    }
  }

  /**
   * The message was given back at a stop.
   *
   * @param message the message
   */
  record Returned(Message<?> message) implements Event {
    @Override
    public String name() {
      return "returned";
    }
  }

  /**
   * A message cannot be returned as requested.
   *
   * @param rejected the message, and why it is rejected
   */
  record Rejected(io.fetchproxy.v1.Rejected rejected) implements Event {
    @Override
    public String name() {
      return "rejected";
    }
  }

  /**
   * The lease is lost. The thread of the handler is interrupted.
   *
   * @param message the message
   * @param reason a reason of the page "Errors"
   * @param detail a text for people
   */
  record Lost(Message<?> message, String reason, String detail) implements Event {
    @Override
    public String name() {
      return "lost";
    }
  }

  /**
   * A call failed, and is repeated.
   *
   * @param reason a reason of the page "Errors"
   * @param detail a text for people
   * @param waitTime the time until the repeat
   */
  record Retry(String reason, String detail, Duration waitTime) implements Event {
    @Override
    public String name() {
      return "retry";
    }
  }

  /**
   * A handler failed with an error of its own.
   *
   * @param message the message
   * @param error the error
   */
  record HandlerError(Message<?> message, Throwable error) implements Event {
    @Override
    public String name() {
      return "handler_error";
    }
  }

  /** The run ends without an error. */
  record Stopped() implements Event {
    @Override
    public String name() {
      return "stopped";
    }
  }
}
