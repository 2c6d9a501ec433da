package io.fetchproxy.client;

import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.Rejected;
import java.time.Duration;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.function.Function;

/**
 * The messages in hand, and the threads that handle them. It must know nothing of calls: a subclass
 * brings messages, keeps their leases, and settles them.
 *
 * <p>The lock of this object guards everything that changes.
 */
abstract class Loop {
  final Options options;
  final Client client;
  final Events events;
  final Set<Held> held = new LinkedHashSet<>();
  private final Work<?> work;
  private final ExecutorService threads;
  private int running; // Threads inside a handler.
  private int stuck; // Those of them whose message is gone.
  private boolean stopping;

  Loop(Options options, Events events, Work<?> work) {
    this.options = options;
    this.client = options.client;
    this.events = events;
    this.work = work;
    this.threads = Executors.newFixedThreadPool(options.concurrency, options.threadFactory);
  }

  /** Returns when the loop is stopped and every message is settled. Throws if it is refused. */
  abstract void run() throws InterruptedException;

  /** Takes no more messages. Called with the lock, once. */
  abstract void stopTaking();

  /** The number of handlers that run or can run has changed. Called with the lock. */
  abstract void placesChanged();

  /** A message in hand, and the right to settle it until its lease ends. */
  abstract class Held {
    final Delivery delivery;
    final long keptUntil = Times.now() + options.atMost.toMillis();
    private Message<?> message;
    private Future<?> task;
    private boolean begun;
    private boolean inHandler;
    private Outcome outcome; // Null until the work is done.
    private boolean gone; // Settled or lost.

    Held(Delivery delivery) {
      this.delivery = delivery;
      this.message = new Message<>(delivery, null);
    }

    /** The outcome is there. Called with the lock. */
    abstract void decided();

    /** The lease is over. Called with the lock. */
    abstract void left();

    /** Whether the lease has ended by the clock. Called with the lock. */
    abstract boolean isOver();

    Outcome outcome() {
      return outcome;
    }

    boolean isGone() {
      return gone;
    }

    boolean waits() {
      return !begun && outcome == null && !gone;
    }

    boolean isUndecided() {
      return outcome == null && !gone;
    }

    void decide(Outcome decided) {
      if (gone || outcome != null) return;
      outcome = decided;
      decided();
    }

    void lose(FetchProxyException why) {
      if (gone) return;
      boolean isTold = outcome != null && outcome.event() == null;
      if (!isTold) events.tell(new Event.Lost(message, why.reason(), why.detail()));
      go();
      interrupt();
    }

    /** The proxy has confirmed the outcome. */
    void settle() {
      if (gone) return;
      if (outcome.event() != null) events.tell(outcome.event().apply(message));
      go();
    }

    private void go() {
      gone = true;
      held.remove(this);
      if (inHandler) {
        stuck++;
        placesChanged();
      }
      left();
    }

    private void interrupt() {
      if (task != null) task.cancel(true);
    }

    /** Ends the work, and gives the message back if that does not end it. */
    private void giveBack() {
      if (!isUndecided()) return;
      if (message.isLastAttempt()) {
        lose(FetchProxyException.lost("the worker stops, and a Nak would end the last attempt"));
        return;
      }
      decide(Outcome.returned());
      interrupt();
    }

    private boolean begin() {
      synchronized (Loop.this) {
        if (!waits() || isOver()) return false;
        begun = true;
        inHandler = true;
        running++;
        return true;
      }
    }

    /** Runs in a thread of the handlers. */
    private void work() {
      if (!begin()) return;
      Work.Done done = null;
      try {
        done = work.on(delivery);
      } finally {
        synchronized (Loop.this) {
          end(done);
        }
      }
    }

    private void end(Work.Done done) {
      inHandler = false;
      running--;
      if (gone) stuck--;
      if (done != null && isUndecided()) {
        message = done.message();
        if (done.error() != null) events.tell(new Event.HandlerError(message, done.error()));
        decide(done.outcome());
      }
      placesChanged();
    }
  }

  /** Handles a message when a thread is free. Called with the lock. */
  void take(Held message) {
    held.add(message);
    message.task = threads.submit(message::work);
    if (stopping) giveBackWaiting();
  }

  /** Tells of a rejected message. If it is still leased to this worker, settles it. */
  void refuse(Rejected rejected, Function<Delivery, Held> hold) {
    events.tell(new Event.Rejected(rejected));
    if (rejected.getToken().isEmpty()) return;
    var delivery =
        Delivery.newBuilder()
            .setToken(rejected.getToken())
            .setNumber(rejected.getNumber())
            .setSubject(rejected.getSubject())
            .setStreamSequence(rejected.getStreamSequence())
            .setDeliveryCount(rejected.getDeliveryCount())
            .setLease(rejected.getLease());
    Held message = hold.apply(delivery.build());
    held.add(message);
    message.decide(Outcome.ofRejected(rejected));
  }

  /** The first stop lets handlers end. The second stop ends them. */
  synchronized void stop() {
    if (stopping) {
      endHandlers();
      return;
    }
    stopping = true;
    giveBackWaiting();
    stopTaking();
    notifyAll();
  }

  /** Gives back each message that waits for a thread. A last attempt would not come back. */
  private void giveBackWaiting() {
    int free = freePlaces();
    for (Held message : List.copyOf(held)) {
      if (!message.waits() || free-- > 0) continue;
      if (!message.message.isLastAttempt()) message.giveBack();
    }
  }

  /** Interrupts all handlers, and gives their messages back. */
  synchronized void endHandlers() {
    List.copyOf(held).forEach(Held::giveBack);
    notifyAll();
  }

  boolean isStopping() {
    return stopping;
  }

  /** The number of messages that may be handled at once. A handler that hangs has its place. */
  int places() {
    return options.concurrency - stuck;
  }

  int freePlaces() {
    return options.concurrency - running;
  }

  void loseAll(FetchProxyException why) {
    List.copyOf(held).forEach(message -> message.lose(why));
  }

  /** Tells of the repeat, and returns the wait before it, in milliseconds. */
  long waitAfter(FetchProxyException error, int failed) {
    long wait = Times.waitAfter(error, failed);
    events.tell(new Event.Retry(error.reason(), error.detail(), Duration.ofMillis(wait)));
    client.reconnectSoon();
    return wait;
  }

  /** Ends early when the loop is stopped. Called with the lock. */
  void pause(long time) throws InterruptedException {
    boolean wasStopping = stopping;
    long until = Times.now() + time;
    while (Times.now() < until && stopping == wasStopping) wait(until - Times.now());
  }

  /** Ends the threads. A handler that hangs does not keep the process alive. */
  void close() {
    threads.shutdownNow();
  }
}
