package io.fetchproxy.client;

import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.ExtendAction;
import io.fetchproxy.v1.FetchRequest;
import io.fetchproxy.v1.FetchResponse;
import io.fetchproxy.v1.SettleRequest;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.grpc.Context;
import io.grpc.StatusRuntimeException;
import java.util.ArrayList;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Set;

/**
 * A call brings each batch, and a keeper settles and extends in calls of its own. So the next batch
 * comes while the last outcomes are settled. It must know nothing of handlers.
 */
final class FetchLoop extends Loop {
  // All times are in milliseconds.
  /** After an empty answer that came sooner, the worker waits for the rest of this time. */
  private static final long TOO_SOON = 500;

  /** How long an outcome may wait for others, to be settled in the same call. */
  private static final long GATHER = 20;

  /** The shortest lease that the proxy allows. */
  private static final long SHORTEST = 1_000;

  /** A Settle with more parts is refused. Nothing is fetched while so many outcomes wait. */
  private static final int MOST_SETTLEMENTS = 1_000;

  private final FetchRequest request;
  private final Context.CancellableContext calls = Context.ROOT.withCancellation();

  // The lock of the loop guards all that follows, and all that changes of a message.
  private final Set<Leased> kept = new LinkedHashSet<>(); // The messages in hand.
  private boolean ended; // The keeper has nothing more to do.
  private RuntimeException broken; // A defect has ended the keeper.

  FetchLoop(Options options, Events events, Work<?> work) {
    super(options, events, work);
    var request =
        FetchRequest.newBuilder()
            .setStream(options.stream)
            .setConsumer(options.consumer)
            .setMaxWait(Times.duration(options.maxWait))
            .setMaxBytes((int) Math.min(options.maxBytes, Connection.MAX_BYTES))
            .setCodec(options.codec)
            .setWorker(options.name);
    if (options.lease != null) request.setLease(Times.duration(options.lease));
    this.request = request.build();
  }

  @Override
  void run() throws InterruptedException {
    Threads.named("fetchproxy-keeper").newThread(this::keep).start();
    try {
      fetchUntilStopped();
    } catch (FetchProxyException refused) {
      // The messages in hand may still be settled.
      stop();
      awaitNothing();
      throw refused;
    }
    awaitNothing();
  }

  private void fetchUntilStopped() throws InterruptedException {
    for (int n = awaitPlace(); n > 0; n = awaitPlace()) {
      FetchResponse answer = fetch(n);
      synchronized (this) {
        for (Delivery delivery : answer.getMessagesList()) take(new Leased(delivery));
        for (var rejected : answer.getRejectedList()) refuse(rejected, Leased::new);
        notifyAll();
      }
    }
  }

  /** Returns how many messages to fetch: 0 if the loop is stopped. */
  private synchronized int awaitPlace() throws InterruptedException {
    while (!isStopping()) {
      long waiting = kept.stream().filter(Held::waits).count();
      int undecided = (int) kept.stream().filter(Held::isUndecided).count();
      long bytes = kept.stream().filter(Held::isUndecided).mapToLong(Leased::size).sum();
      int n = options.batch - undecided - (options.concurrency - places());
      boolean hasRoom = bytes < options.maxBytes && kept.size() - undecided < MOST_SETTLEMENTS;
      if (waiting == 0 && freePlaces() > 0 && n > 0 && hasRoom) return n;
      awaitChange();
    }
    return 0;
  }

  /**
   * Repeats the call until it is answered. The repeats have one name, so they get the messages of
   * an answer that was lost.
   */
  private FetchResponse fetch(int n) throws InterruptedException {
    var attempt = request.toBuilder().setN(n).setAttemptId(Client.newAttempt());
    for (int failed = 0; !calls.isCancelled(); failed++) {
      long began = Times.now();
      try {
        FetchResponse answer = call(attempt.build());
        boolean nothing = answer.getMessagesCount() + answer.getRejectedCount() == 0;
        if (nothing) rest(TOO_SOON - (Times.now() - began));
        return answer;
      } catch (StatusRuntimeException error) {
        var trouble = FetchProxyException.of(error);
        if (calls.isCancelled()) break;
        if (Thread.interrupted()) {
          client.giveUp(attempt.build());
          throw new InterruptedException();
        }
        if (!trouble.isRepeatable()) throw trouble;
        attempt.setAttemptAgain(true);
        rest(waitAfter(trouble, failed));
      }
    }
    client.giveUp(attempt.build());
    return FetchResponse.getDefaultInstance();
  }

  private FetchResponse call(FetchRequest attempt) {
    Context before = calls.attach();
    try {
      return client.fetchOnce(attempt);
    } finally {
      calls.detach(before);
    }
  }

  private synchronized void rest(long time) throws InterruptedException {
    if (!isStopping()) pause(time);
  }

  private synchronized void awaitNothing() throws InterruptedException {
    while (!held.isEmpty()) awaitChange();
  }

  private void awaitChange() throws InterruptedException {
    if (broken != null) throw broken;
    wait();
  }

  @Override
  void stopTaking() {
    calls.cancel(null);
  }

  @Override
  void placesChanged() {
    notifyAll();
  }

  @Override
  void close() {
    super.close();
    calls.cancel(null);
    synchronized (this) {
      ended = true;
      notifyAll();
    }
  }

  /** Runs in the thread of the keeper. Nobody else calls Settle. */
  private void keep() {
    try {
      while (awaitTurn()) turn();
    } catch (InterruptedException | RuntimeException defect) {
      synchronized (this) {
        broken = new IllegalStateException("the keeper of leases has ended", defect);
        notifyAll();
      }
    }
  }

  /** Waits until there is something to do. Returns false at the end. */
  private synchronized boolean awaitTurn() throws InterruptedException {
    while (!ended) {
      long next = Long.MAX_VALUE;
      for (Leased message : List.copyOf(kept)) {
        if (message.isOver()) message.lose(FetchProxyException.lost("by the clock, it is over"));
        else next = Math.min(next, Math.min(message.next, message.ends));
      }
      if (next <= Times.now()) return true;
      if (next == Long.MAX_VALUE) wait();
      else wait(next - Times.now());
    }
    return false;
  }

  /** Settles and extends all messages that are due, in one call. */
  private void turn() {
    List<Part> parts = due();
    if (parts.isEmpty()) return;
    var request = SettleRequest.newBuilder();
    parts.forEach(part -> request.addSettlements(part.settlement));
    long sent = Times.now();
    long shortest = parts.stream().mapToLong(part -> part.ends - sent).min().getAsLong();
    try {
      var stub = client.within(Times.clamp(shortest / 2, 1_000, 10_000));
      note(parts, sent, stub.settle(request.build()).getResultsList(), null);
    } catch (StatusRuntimeException error) {
      note(parts, sent, List.of(), FetchProxyException.of(error));
    }
  }

  private synchronized List<Part> due() {
    var due = kept.stream().filter(Leased::isDue).limit(MOST_SETTLEMENTS);
    return due.map(each -> new Part(each, each.outcome(), each.settlement(), each.ends)).toList();
  }

  /** Records the failure of the call, or the results of its parts. */
  private synchronized void note(
      List<Part> parts, long sent, List<SettleResult> results, FetchProxyException failure) {
    var again = new ArrayList<Leased>();
    FetchProxyException reason = null;
    int failed = 0;
    for (int i = 0; i < parts.size(); i++) {
      Leased message = parts.get(i).message;
      FetchProxyException trouble = failure != null ? failure : Client.failure(results.get(i));
      if (trouble != null && trouble.isRepeatable()) {
        again.add(message);
        reason = trouble;
        failed = Math.max(failed, message.failed);
      } else if (trouble != null) {
        message.lose(trouble);
      } else if (parts.get(i).outcome != null) {
        message.settle();
      } else {
        message.lasts(sent, Times.millis(results.get(i).getLease()));
      }
    }
    if (reason == null) return;
    long next = Times.now() + waitAfter(reason, failed);
    for (Leased message : again) {
      message.failed = failed + 1;
      message.next = next;
    }
  }

  /** The action for a message in one call. Without an outcome, it extends the lease. */
  private record Part(Leased message, Outcome outcome, Settlement settlement, long ends) {}

  /** A message, and when its lease ends. */
  private final class Leased extends Held {
    private final long granted;
    private long ends;
    private long next; // When to extend or settle it.
    private int failed; // The number of failed calls in a row.

    Leased(Delivery delivery) {
      super(delivery);
      granted = Times.millis(delivery.getLease());
      lasts(Times.now(), granted);
      kept.add(this);
    }

    @Override
    void decided() {
      failed = 0;
      boolean isLast = kept.stream().noneMatch(Held::isUndecided);
      next = Times.now() + (isLast ? 0 : GATHER);
      FetchLoop.this.notifyAll();
    }

    @Override
    void left() {
      kept.remove(this);
      FetchLoop.this.notifyAll();
    }

    long size() {
      return Decoder.payload(delivery).size();
    }

    /** Includes a message that is due soon. A message whose call failed waits for its full time. */
    private boolean isDue() {
      return next - Times.now() <= (failed == 0 ? GATHER : 0) && !isOver();
    }

    @Override
    boolean isOver() {
      return ends <= Times.now();
    }

    /** The outcome, or an Extend if there is no outcome. */
    private Settlement settlement() {
      String token = delivery.getToken();
      if (outcome() != null) return outcome().action().clone().setToken(token).build();
      // Without a length, the lease lasts as long as it was granted.
      var extend = ExtendAction.newBuilder();
      long left = keptUntil - Times.now();
      if (left < granted) extend.setLease(Times.duration(Math.max(left, SHORTEST)));
      return Settlement.newBuilder().setToken(token).setExtend(extend).build();
    }

    private void lasts(long from, long left) {
      ends = Math.min(from + left, outcome() == null ? keptUntil : Long.MAX_VALUE);
      failed = 0;
      if (outcome() != null) return; // It was decided in the meantime.
      next = ends == keptUntil ? ends : Times.now() + Math.max((ends - Times.now()) / 3, 50);
    }
  }
}
