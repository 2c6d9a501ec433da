package io.fetchproxy.client;

import java.lang.System.Logger;
import java.lang.System.Logger.Level;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;

/** Calls the listener with each event, in order, in a thread of its own. */
final class Events {
  private static final Logger LOG = System.getLogger("io.fetchproxy.client");

  private final Consumer<Event> listener;
  private final ThreadPoolExecutor caller =
      new ThreadPoolExecutor(
          1,
          1,
          0,
          TimeUnit.SECONDS,
          new LinkedBlockingQueue<>(),
          Threads.named("fetchproxy-events"),
          new ThreadPoolExecutor.DiscardPolicy());

  Events(Consumer<Event> listener) {
    this.listener = listener != null ? listener : Events::log;
  }

  void tell(Event event) {
    caller.execute(() -> call(event));
  }

  private void call(Event event) {
    try {
      listener.accept(event);
    } catch (Throwable error) {
      LOG.log(Level.WARNING, "the listener failed at the event " + event.name(), error);
    }
  }

  /** Waits until the listener has had all events. */
  void close() throws InterruptedException {
    caller.shutdown();
    if (!caller.awaitTermination(10, TimeUnit.SECONDS)) {
      LOG.log(Level.WARNING, "the listener of the worker does not return");
    }
  }

  private static void log(Event event) {
    if (event instanceof Event.Rejected one) {
      warn(one.rejected().getStreamSequence(), "rejected: " + one.rejected().getDetail(), null);
    } else if (event instanceof Event.Termed one) {
      warn(one.message().streamSequence(), "termed: " + one.reason(), null);
    } else if (event instanceof Event.Lost one) {
      String why = one.reason() + ": " + one.detail();
      warn(one.message().streamSequence(), "lost: " + why, null);
    } else if (event instanceof Event.HandlerError one) {
      warn(one.message().streamSequence(), "its handler failed", one.error());
    } else if (event instanceof Event.Retry one) {
      String why = one.reason() + ": " + one.detail();
      LOG.log(Level.WARNING, "a call failed and is repeated in " + one.waitTime() + ": " + why);
    }
  }

  private static void warn(long sequence, String what, Throwable error) {
    LOG.log(Level.WARNING, "message " + sequence + " " + what, error);
  }
}
