package io.fetchproxy.example;

import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.fetchproxy.v1.AckAction;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.ExtendAction;
import io.fetchproxy.v1.FetchRequest;
import io.fetchproxy.v1.FetchResponse;
import io.fetchproxy.v1.FetchServiceGrpc;
import io.fetchproxy.v1.FetchServiceGrpc.FetchServiceBlockingStub;
import io.fetchproxy.v1.NakAction;
import io.fetchproxy.v1.Rejected;
import io.fetchproxy.v1.RejectedCause;
import io.fetchproxy.v1.SettleError;
import io.fetchproxy.v1.SettleRequest;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.fetchproxy.v1.TermAction;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;
import java.util.function.ObjDoubleConsumer;

/**
 * What every worker needs around the generated client: which errors are worth repeating a call and
 * after how long, a heartbeat that keeps leases, and settling with the same token until it is done.
 */
final class FetchProxy implements AutoCloseable {
  /** The largest answer that is asked for, and taken. */
  static final int MAX_BYTES = 16 << 20;

  // All times are in milliseconds.
  /** The first wait before a call is repeated, if the proxy does not say how long. */
  private static final long FIRST_WAIT = 100;

  private static final long LONGEST_WAIT = 5_000;

  /** What a Fetch has beyond its max_wait, and a settlement at all: the proxy answers before. */
  private static final long PATIENCE = 10_000;

  /** An empty answer that came sooner is followed by a pause. */
  private static final long TOO_SOON = 1_000;

  private static final long PAUSE = 500;

  /** The proxy grants no shorter lease to those who ask. */
  private static final long SHORTEST_LEASE = 1_000;

  /**
   * Nor does it take a longer delay; one settlement that it does not take spoils the whole call.
   */
  private static final long LONGEST_DELAY = TimeUnit.HOURS.toMillis(24);

  /** With these, the same call would be refused again. */
  private static final Set<Status.Code> REFUSALS =
      Set.of(
          Status.Code.INVALID_ARGUMENT,
          Status.Code.NOT_FOUND,
          Status.Code.FAILED_PRECONDITION,
          Status.Code.PERMISSION_DENIED,
          Status.Code.UNAUTHENTICATED,
          Status.Code.UNIMPLEMENTED);

  private final ManagedChannel channel;
  private final FetchServiceBlockingStub stub;
  private final ObjDoubleConsumer<String> onRetry;
  private final Context.CancellableContext stop = Context.current().withCancellation();
  private final CountDownLatch stopped = new CountDownLatch(1);

  /**
   * Connects to any target that gRPC knows, as {@code dns:///fetch-proxy:50051}.
   *
   * @param onRetry is told the reason and the seconds before each wait after an error
   */
  FetchProxy(String target, ObjDoubleConsumer<String> onRetry) {
    this.onRetry = onRetry;
    channel =
        Grpc.newChannelBuilder(target, InsecureChannelCredentials.create())
            .maxInboundMessageSize(MAX_BYTES)
            .keepAliveTime(30, TimeUnit.SECONDS)
            .build();
    stub = FetchServiceGrpc.newBlockingStub(channel);
  }

  /** Ends the fetching, from any thread. What is in hand can still be settled. */
  void stop() {
    stop.cancel(null);
    stopped.countDown();
  }

  boolean isStopped() {
    return stop.isCancelled();
  }

  @Override
  public void close() throws InterruptedException {
    channel.shutdown().awaitTermination(1, TimeUnit.SECONDS);
  }

  /**
   * Repeats the call until it is answered, and throws when it is refused for good.
   *
   * @return an empty answer when stopped
   */
  FetchResponse fetch(FetchRequest request) throws InterruptedException {
    for (int attempt = 0; !isStopped(); attempt++) {
      long began = now();
      try {
        FetchResponse answer = fetchOnce(request);
        boolean nothing = answer.getMessagesCount() + answer.getRejectedCount() == 0;
        if (nothing && now() - began < TOO_SOON) {
          stopped.await(PAUSE, TimeUnit.MILLISECONDS);
        }
        return answer;
      } catch (StatusRuntimeException error) {
        Trouble trouble = Trouble.of(error);
        if (!isStopped()) {
          if (!trouble.passes) throw error;
          stopped.await(waitAfter(trouble, attempt), TimeUnit.MILLISECONDS);
        }
      }
    }
    return FetchResponse.getDefaultInstance();
  }

  private FetchResponse fetchOnce(FetchRequest request) {
    Context before = stop.attach();
    try {
      return within(millis(request.getMaxWait()) + PATIENCE).fetch(request);
    } finally {
      stop.detach(before);
    }
  }

  /** Takes the messages of an answer in hand, and starts their heartbeat. */
  Batch hold(List<Delivery> messages) {
    return new Batch(messages);
  }

  /**
   * Settles a rejected message that is still leased to us. Should that fail, the lease ends by
   * itself, and the message is rejected again.
   */
  void refuse(Rejected rejected) {
    if (rejected.getToken().isEmpty()) return;
    Settlement.Builder settlement =
        rejected.getCause() == RejectedCause.REJECTED_CAUSE_TOO_LARGE
            ? nak(60_000) // Perhaps there is a worker with a larger MAX_BYTES.
            : term(rejected.getDetail());
    try {
      settle(List.of(settlement.setToken(rejected.getToken()).build()), PATIENCE);
    } catch (StatusRuntimeException error) {
      log(rejected.getStreamSequence(), error.getMessage());
    }
  }

  private List<SettleResult> settle(List<Settlement> settlements, long timeout) {
    var request = SettleRequest.newBuilder().addAllSettlements(settlements).build();
    return within(timeout).settle(request).getResultsList();
  }

  private FetchServiceBlockingStub within(long timeout) {
    return stub.withDeadlineAfter(timeout, TimeUnit.MILLISECONDS);
  }

  /**
   * As long as the error asks for, or else longer each time. There is some chance in it, for
   * workers that failed together must not come back together.
   */
  private long waitAfter(Trouble trouble, int attempt) {
    long least = trouble.delay > 0 ? trouble.delay : (FIRST_WAIT << Math.min(attempt, 6)) / 2;
    long wait = Math.min(least + ThreadLocalRandom.current().nextLong(least), LONGEST_WAIT);
    onRetry.accept(trouble.reason, wait / 1e3);
    // The channel would wait for up to two minutes before it connects anew.
    channel.resetConnectBackoff();
    return wait;
  }

  /**
   * What a handler throws for a failure that may pass: the message comes back after the delay, in
   * seconds.
   */
  static final class Transient extends Exception {
    final double delay;

    Transient(double delay) {
      this.delay = delay;
    }
  }

  /** What a handler throws for a failure that never passes: the message does not come back. */
  static final class Poison extends Exception {
    Poison(String reason) {
      super(reason);
    }
  }

  /** How a message ended for this worker. */
  enum Outcome {
    ACKED,
    NACKED,
    TERMED,
    /** Not begun, and given back. */
    RETURNED,
    /** The lease was over: another worker has the message, or will. */
    LOST
  }

  /** A message in hand, and the right to settle it until the lease ends. */
  static final class Lease {
    final Delivery message;
    private long ends;
    private Outcome outcome;
    private Settlement settlement; // What was decided, until it is settled.
    private long decided;
    private boolean kept = true; // By the heartbeat, until it is being settled.

    private Lease(Delivery message) {
      this.message = message;
      ends = now() + millis(message.getLease());
    }

    /** Whether another worker may have the message: work on it would be done twice. */
    synchronized boolean isLost() {
      if (outcome != Outcome.LOST && left() <= 0) lose("by our clock, its lease is over");
      return outcome == Outcome.LOST;
    }

    /** Certain once {@link Batch#settle} has returned the lease. */
    synchronized Outcome outcome() {
      return outcome;
    }

    /** Decides that the message is done. {@link Batch#settle} carries out what was decided. */
    void ack() {
      decide(Outcome.ACKED, Settlement.newBuilder().setAck(AckAction.getDefaultInstance()));
    }

    /** Decides that the message is to come back after the delay, in seconds. */
    void nak(double delay) {
      decide(Outcome.NACKED, FetchProxy.nak(Math.round(delay * 1e3)));
    }

    /** Decides that the message is not to come back. */
    void term(String reason) {
      decide(Outcome.TERMED, FetchProxy.term(reason));
    }

    /** Decides that the message is for another worker, at once. */
    void giveBack() {
      decide(Outcome.RETURNED, FetchProxy.nak(0));
    }

    private synchronized void decide(Outcome decision, Settlement.Builder action) {
      if (isLost()) return;
      outcome = decision;
      settlement = action.setToken(message.getToken()).build();
      decided = now();
    }

    private synchronized boolean takeDecided() {
      boolean taken = kept && (isLost() || settlement != null);
      if (taken) kept = false;
      return taken;
    }

    private synchronized boolean isOpen() {
      return settlement != null && !isLost();
    }

    private synchronized boolean isKept() {
      return kept && !isLost();
    }

    private synchronized long waited() {
      return kept && settlement != null ? now() - decided : 0;
    }

    private synchronized long left() {
      return ends - now();
    }

    private Settlement extension() {
      long length = Math.max(millis(message.getLease()), SHORTEST_LEASE);
      var extend = ExtendAction.newBuilder().setLease(duration(length));
      return Settlement.newBuilder().setToken(message.getToken()).setExtend(extend).build();
    }

    private synchronized void extended(SettleResult result) {
      // What is being settled meanwhile may be refused for that.
      if (!kept) return;
      if (!result.hasError()) {
        ends = now() + millis(result.getLease());
      } else if (!Trouble.of(result.getError()).passes) {
        lose(result.getError().getMessage());
      }
    }

    /** Returns the trouble if it is to be repeated. */
    private synchronized Optional<Trouble> settled(SettleResult result) {
      Trouble trouble = Trouble.of(result.getError());
      if (result.hasError() && trouble.passes) return Optional.of(trouble);
      if (result.hasError()) lose(result.getError().getMessage());
      settlement = null;
      return Optional.empty();
    }

    private synchronized void lose(String why) {
      log(message.getStreamSequence(), "lost: " + why);
      outcome = Outcome.LOST;
      settlement = null;
    }
  }

  /** What one Fetch brought. A heartbeat keeps its leases until they are settled. */
  final class Batch implements AutoCloseable {
    final List<Lease> leases;
    private final Thread heart = new Thread(this::beat, "heartbeat");

    private Batch(List<Delivery> messages) {
      leases = messages.stream().map(Lease::new).toList();
      heart.setDaemon(true);
      heart.start();
    }

    /** Ends the heartbeat. Leases that are not settled end by themselves. */
    @Override
    public void close() {
      heart.interrupt();
    }

    /** For how many milliseconds the oldest decision has been waiting for {@link #settle}. */
    long waited() {
      return leases.stream().mapToLong(Lease::waited).max().orElse(0);
    }

    /**
     * Carries out what was decided, and returns it together with what was lost. Goes on until each
     * is done, refused for good, or over: every settlement may be repeated with the same token.
     */
    List<Lease> settle() throws InterruptedException {
      List<Lease> taken = leases.stream().filter(Lease::takeDecided).toList();
      for (int attempt = 0; ; attempt++) {
        List<Lease> open = taken.stream().filter(Lease::isOpen).toList();
        if (open.isEmpty()) return taken;
        Optional<Trouble> trouble = settleOnce(open);
        if (trouble.isPresent()) Thread.sleep(waitAfter(trouble.get(), attempt));
      }
    }

    /** Returns the trouble of those that are to be repeated, if there are any. */
    private Optional<Trouble> settleOnce(List<Lease> open) {
      try {
        var results = FetchProxy.this.settle(map(open, lease -> lease.settlement), PATIENCE);
        var troubles = new ArrayList<Trouble>();
        for (int i = 0; i < open.size(); i++) {
          open.get(i).settled(results.get(i)).ifPresent(troubles::add);
        }
        return troubles.stream().findFirst();
      } catch (StatusRuntimeException error) {
        Trouble trouble = Trouble.of(error);
        if (trouble.passes) return Optional.of(trouble);
        open.forEach(lease -> lease.lose(error.getMessage()));
        return Optional.empty();
      }
    }

    /** Extends the leases whenever a third of what is left of the shortest has passed. */
    private void beat() {
      try {
        for (List<Lease> kept = kept(); !kept.isEmpty(); kept = kept()) {
          Thread.sleep(Math.max(shortest(kept) / 3, 20));
          extend(kept());
        }
      } catch (InterruptedException closed) {
        // As it should be.
      }
    }

    private List<Lease> kept() {
      return leases.stream().filter(Lease::isKept).toList();
    }

    private static long shortest(List<Lease> leases) {
      return leases.stream().mapToLong(Lease::left).min().orElse(0);
    }

    /** Is not repeated when it fails: the next beat comes soon enough. */
    private void extend(List<Lease> kept) throws InterruptedException {
      if (kept.isEmpty()) return;
      try {
        long timeout = Math.max(shortest(kept) / 2, 100);
        var results = FetchProxy.this.settle(map(kept, Lease::extension), timeout);
        for (int i = 0; i < kept.size(); i++) {
          kept.get(i).extended(results.get(i));
        }
      } catch (StatusRuntimeException error) {
        if (Thread.interrupted()) throw new InterruptedException();
        System.err.println("no heartbeat: " + error.getMessage());
      }
    }
  }

  /**
   * What an error means for its call.
   *
   * @param passes whether to repeat the call
   * @param delay after how long; zero if the proxy did not say
   */
  private record Trouble(String reason, boolean passes, long delay) {
    /** An error without a reason was made on the way: its code alone tells. */
    static Trouble of(StatusRuntimeException error) {
      Status.Code code = error.getStatus().getCode();
      var info = detail(error, ErrorInfo.class).map(ErrorInfo::getReason);
      var delay = detail(error, RetryInfo.class).map(retry -> millis(retry.getRetryDelay()));
      return new Trouble(info.orElse(code.name()), !REFUSALS.contains(code), delay.orElse(0L));
    }

    static Trouble of(SettleError error) {
      boolean passes = error.hasRetryDelay() || error.getReason().equals("SETTLE_UNCONFIRMED");
      return new Trouble(error.getReason(), passes, millis(error.getRetryDelay()));
    }

    private static <T extends Message> Optional<T> detail(
        StatusRuntimeException error, Class<T> type) {
      try {
        for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
          if (detail.is(type)) return Optional.of(detail.unpack(type));
        }
      } catch (InvalidProtocolBufferException malformed) {
        // As if it were not there.
      }
      return Optional.empty();
    }
  }

  private static Settlement.Builder nak(long delay) {
    long taken = Math.min(Math.max(delay, 0), LONGEST_DELAY);
    return Settlement.newBuilder().setNak(NakAction.newBuilder().setDelay(duration(taken)));
  }

  private static Settlement.Builder term(String reason) {
    return Settlement.newBuilder()
        .setTerm(TermAction.newBuilder().setReason(String.valueOf(reason)));
  }

  static Duration duration(long millis) {
    int nanos = (int) (millis % 1_000) * 1_000_000;
    return Duration.newBuilder().setSeconds(millis / 1_000).setNanos(nanos).build();
  }

  private static long millis(Duration duration) {
    return duration.getSeconds() * 1_000 + duration.getNanos() / 1_000_000;
  }

  private static long now() {
    return System.nanoTime() / 1_000_000;
  }

  private static void log(long sequence, String what) {
    System.err.println("message " + sequence + ": " + what);
  }

  private static <T, R> List<R> map(List<T> list, Function<T, R> with) {
    return list.stream().map(with).toList();
  }
}
