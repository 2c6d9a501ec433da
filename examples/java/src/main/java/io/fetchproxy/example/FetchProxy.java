package io.fetchproxy.example;

import com.google.gson.Gson;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.Duration;
import com.google.protobuf.InvalidProtocolBufferException;
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
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.FutureTask;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;

/**
 * What every worker needs around the generated client: a channel, a Fetch that is repeated until it
 * is answered, and its batch, with a keeper of the leases. Says a JSON line of all that happens to
 * a message. Must know nothing of the work.
 */
final class FetchProxy {
  /** The largest answer to ask for; what is received may be a little larger. */
  static final int MAX_BYTES = 16 << 20;

  // All times are in milliseconds.
  /** The first wait before a call is repeated. */
  private static final long FIRST_WAIT = 100;

  private static final long LONGEST_WAIT = 5_000;

  /** What a Fetch has beyond its max_wait: the proxy answers well before. */
  private static final long PATIENCE = 5_000;

  /** An empty answer that came sooner waits out the rest. */
  private static final long TOO_SOON = 500;

  /** How long an outcome may wait for others, to be settled with them. */
  private static final long GATHER = 100;

  private static final long HOUR = 3_600_000;

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
  private final Context.CancellableContext stop = Context.ROOT.withCancellation();
  private final CountDownLatch stopped = new CountDownLatch(1);

  /** Connects to {@code host:port}, or to every address of {@code dns:///name:port}. */
  FetchProxy(String target) {
    channel =
        Grpc.newChannelBuilder(target, InsecureChannelCredentials.create())
            .defaultLoadBalancingPolicy("round_robin")
            .maxInboundMessageSize(MAX_BYTES + (1 << 20))
            .keepAliveTime(30, TimeUnit.SECONDS)
            .keepAliveWithoutCalls(true)
            .build();
    stub = FetchServiceGrpc.newBlockingStub(channel);
  }

  /** Ends the fetching, from any thread, and gives back what is in hand and not begun. */
  void stop() {
    stop.cancel(null);
    stopped.countDown();
  }

  boolean isStopped() {
    return stop.isCancelled();
  }

  /**
   * Repeats the call until it is answered, and throws when it is refused for good.
   *
   * @return an empty batch when stopped
   */
  Batch fetch(FetchRequest request) throws Exception {
    for (int failed = 0; !isStopped(); failed++) {
      long began = now();
      try {
        var call = within(millis(request.getMaxWait()) + PATIENCE);
        FetchResponse answer = stop.call(() -> call.fetch(request));
        boolean nothing = answer.getMessagesCount() + answer.getRejectedCount() == 0;
        if (nothing) pause(TOO_SOON - (now() - began));
        return new Batch(answer);
      } catch (StatusRuntimeException error) {
        Trouble trouble = Trouble.of(error);
        if (isStopped()) break;
        if (!trouble.passes) throw new IllegalStateException(trouble.toString(), error);
        pause(waitAfter(trouble, failed));
      }
    }
    return new Batch(FetchResponse.getDefaultInstance());
  }

  private void pause(long time) throws InterruptedException {
    stopped.await(time, TimeUnit.MILLISECONDS);
  }

  private FetchServiceBlockingStub within(long timeout) {
    return stub.withDeadlineAfter(timeout, TimeUnit.MILLISECONDS);
  }

  /**
   * Tells how long to wait before the call is repeated, and says so. There is some chance in it,
   * for workers that failed together must not come back together.
   */
  private long waitAfter(Trouble trouble, int failed) {
    long most = Math.min(FIRST_WAIT << Math.min(failed, 6), LONGEST_WAIT);
    long wait = Math.min(trouble.delay, LONGEST_WAIT);
    wait += most / 2 + ThreadLocalRandom.current().nextLong(most / 2);
    say("retry", Map.of("reason", trouble.reason, "in", wait / 1e3));
    // By itself, the channel would wait for up to two minutes before it connects anew.
    channel.resetConnectBackoff();
    return wait;
  }

  /** For a failure that may pass: the message comes back after the delay, in milliseconds. */
  static final class Transient extends Exception {
    final long delay;

    Transient(long delay) {
      this.delay = delay;
    }
  }

  /** For a failure that never passes: the message does not come back. */
  static final class Poison extends Exception {
    Poison(String reason) {
      super(reason);
    }
  }

  /**
   * What one Fetch brought. Its keeper, which alone calls Settle, extends what is held and settles
   * what is decided, until every lease is gone: so no outcome waits for the work on another.
   */
  final class Batch {
    final List<Lease> leases;
    private final List<Lease> kept; // Those that are not gone.
    private final FutureTask<Void> keeper = new FutureTask<>(this::keep);
    private final Context.CancellationListener stopping = context -> giveBack();

    private Batch(FetchResponse answer) {
      leases = map(answer.getMessagesList(), m -> new Lease(this, m, millis(m.getLease())));
      kept = new ArrayList<>(leases);
      answer.getRejectedList().forEach(this::refuse);
      stop.addListener(stopping, Runnable::run); // At once, where it is stopped already.
      new Thread(keeper, "keeper").start();
    }

    /** Settles a rejected message that is still leased to us. */
    private void refuse(Rejected rejected) {
      var message =
          Delivery.newBuilder()
              .setToken(rejected.getToken())
              .setStreamSequence(rejected.getStreamSequence())
              .setDeliveryCount(rejected.getDeliveryCount())
              .putAllHeaders(rejected.getHeadersMap())
              .build();
      log(message, "rejected: " + rejected.getDetail());
      say("rejected", message);
      if (message.getToken().isEmpty()) return;
      var lease = new Lease(this, message, millis(rejected.getLease()));
      lease.isRejected = true;
      kept.add(lease);
      boolean tooLarge = rejected.getCause() == RejectedCause.REJECTED_CAUSE_TOO_LARGE;
      // Perhaps another worker takes larger answers.
      lease.decide("rejected", tooLarge ? nak(60_000) : term(rejected.getDetail()));
    }

    /** Waits until every lease is settled, or lost. */
    void await() throws Exception {
      keeper.get();
    }

    private Void keep() throws InterruptedException {
      while (awaitTurn()) turn();
      stop.removeListener(stopping);
      return null;
    }

    /** Waits until there is something to do; false when every lease is gone. */
    private synchronized boolean awaitTurn() throws InterruptedException {
      while (true) {
        for (Lease lease : kept) {
          if (!lease.gone && lease.isOver()) lease.lose("by our clock, it is over");
        }
        kept.removeIf(lease -> lease.gone);
        if (kept.isEmpty()) return false;
        long next = Long.MAX_VALUE;
        for (Lease lease : kept) next = Math.min(next, Math.min(lease.next, lease.ends));
        if (next <= now()) return true;
        wait(next - now());
      }
    }

    /** Settles and extends in one call what it is time for. */
    private void turn() {
      List<Part> parts = take();
      if (parts.isEmpty()) return;
      var request = SettleRequest.newBuilder().addAllSettlements(map(parts, Part::settlement));
      long sent = now();
      long shortest = parts.stream().mapToLong(part -> part.ends - sent).min().getAsLong();
      try {
        var answer = within(clamp(shortest / 2, 1_000, 10_000)).settle(request.build());
        note(parts, sent, answer.getResultsList(), null);
      } catch (StatusRuntimeException error) {
        note(parts, sent, List.of(), Trouble.of(error));
      }
    }

    private synchronized List<Part> take() {
      var due = kept.stream().filter(Lease::isDue).limit(1_000);
      return due.map(lease -> new Part(lease, lease.settlement(), lease.ends)).toList();
    }

    /** Notes what came of it: the failure of the call, or else the results of its parts. */
    private synchronized void note(
        List<Part> parts, long sent, List<SettleResult> results, Trouble failure) {
      var again = new ArrayList<Lease>();
      Trouble reason = null;
      int failed = 0;
      for (int i = 0; i < parts.size(); i++) {
        Lease lease = parts.get(i).lease;
        Trouble trouble = failure == null ? Trouble.of(results.get(i)) : failure;
        if (trouble != null && trouble.passes) {
          again.add(lease);
          reason = trouble;
          failed = Math.max(failed, lease.failed);
        } else if (trouble != null) {
          lease.lose(trouble.toString());
        } else if (lease.outcome == parts.get(i).settlement) {
          lease.goes(lease.event);
        } else {
          lease.lasts(sent, millis(results.get(i).getLease()));
        }
      }
      if (reason == null) return;
      long next = now() + waitAfter(reason, failed);
      for (Lease lease : again) {
        lease.failed = failed + 1;
        lease.next = next;
      }
    }

    /** All that is not begun, but a last attempt: a Nak would be the end of its message. */
    private synchronized void giveBack() {
      for (Lease lease : leases) {
        if (!lease.begun && !lease.isLastAttempt()) lease.decide("returned", nak(0));
      }
    }
  }

  /** What is done with a lease in one call. */
  private record Part(Lease lease, Settlement settlement, long ends) {}

  /** A message in hand, and the right to settle it until the lease ends. */
  static final class Lease {
    final Delivery message;
    private final Batch batch; // Its lock is over all that follows.
    private boolean begun;
    private boolean gone;
    private long ends;
    private long next; // When it is to be extended, or else settled.
    private int failed; // So many calls in a row.
    private Settlement outcome; // What was decided.
    private String event; // What to say when it is settled.
    private boolean isRejected; // Of which all was said.

    private Lease(Batch batch, Delivery message, long left) {
      this.batch = batch;
      this.message = message;
      lasts(now(), left);
    }

    /** Whether to work on the message: not where it is lost, or given back. */
    boolean begin() {
      synchronized (batch) {
        begun = !gone && outcome == null && !isOver();
        return begun;
      }
    }

    /** Decides that the message is done. The keeper carries out what was decided. */
    void ack() {
      decide("acked", Settlement.newBuilder().setAck(AckAction.getDefaultInstance()));
    }

    /** Decides that the message is to come back after the delay, in milliseconds. */
    void nak(long delay) {
      decide("nacked", FetchProxy.nak(delay));
    }

    /** Decides that the message is not to come back. */
    void term(String reason) {
      decide("termed", FetchProxy.term(reason));
    }

    private void decide(String event, Settlement.Builder action) {
      synchronized (batch) {
        if (gone || outcome != null) return;
        this.event = event;
        outcome = action.setToken(message.getToken()).build();
        failed = 0;
        boolean isLast = batch.kept.stream().noneMatch(lease -> lease.outcome == null);
        next = isLast ? now() : now() + GATHER;
        batch.notifyAll();
      }
    }

    /** Takes along what would be due soon; but what failed waits its time out. */
    private boolean isDue() {
      return next - now() <= (failed == 0 ? GATHER : 0) && !isOver();
    }

    private boolean isOver() {
      return ends <= now();
    }

    private boolean isLastAttempt() {
      int most = message.getMaxDeliver();
      return most > 0 && message.getDeliveryCount() >= most;
    }

    /** What was decided, or else an Extend. */
    private Settlement settlement() {
      if (outcome != null) return outcome;
      // Without a length it lasts for as long as it was granted.
      var extend = ExtendAction.getDefaultInstance();
      return Settlement.newBuilder().setToken(message.getToken()).setExtend(extend).build();
    }

    private void lasts(long from, long left) {
      ends = from + left;
      failed = 0;
      // Or else it was decided meanwhile.
      if (outcome == null) next = now() + Math.max((ends - now()) / 3, 50);
    }

    private void lose(String why) {
      log(message, "lost: " + why);
      goes("lost");
    }

    private void goes(String event) {
      gone = true;
      if (!isRejected) say(event, message);
    }
  }

  // One settlement that the proxy does not take would spoil all of a call.

  private static Settlement.Builder nak(long delay) {
    var taken = duration(clamp(delay, 0, 24 * HOUR));
    return Settlement.newBuilder().setNak(NakAction.newBuilder().setDelay(taken));
  }

  /** Cuts the reason to 1 KiB, between two characters. */
  private static Settlement.Builder term(String reason) {
    byte[] bytes = String.valueOf(reason).getBytes(StandardCharsets.UTF_8);
    int end = Math.min(bytes.length, 1_024);
    while (end < bytes.length && (bytes[end] & 0xC0) == 0x80) end--;
    var cut = ByteString.copyFrom(bytes, 0, end);
    return Settlement.newBuilder().setTerm(TermAction.newBuilder().setReasonBytes(cut));
  }

  /**
   * What an error means for its call.
   *
   * @param passes whether to repeat the call
   * @param delay after how long at least, if the proxy said so
   */
  private record Trouble(String reason, String message, boolean passes, long delay) {
    /** An error without a reason was made on the way: its code alone tells. */
    static Trouble of(StatusRuntimeException error) {
      Status.Code code = error.getStatus().getCode();
      String reason = code.name();
      long delay = 0;
      try {
        for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
          if (detail.is(ErrorInfo.class)) {
            var info = detail.unpack(ErrorInfo.class);
            if (info.getDomain().equals("fetchproxy")) reason = info.getReason();
          } else if (detail.is(RetryInfo.class)) {
            delay = millis(detail.unpack(RetryInfo.class).getRetryDelay());
          }
        }
      } catch (InvalidProtocolBufferException malformed) {
        // As if it were not there.
      }
      String message = error.getStatus().getDescription();
      return new Trouble(reason, message, !REFUSALS.contains(code), delay);
    }

    /** None where all is well. */
    static Trouble of(SettleResult result) {
      if (!result.hasError()) return null;
      SettleError error = result.getError();
      boolean passes = error.hasRetryDelay() || error.getReason().equals("SETTLE_UNCONFIRMED");
      long delay = millis(error.getRetryDelay());
      return new Trouble(error.getReason(), error.getMessage(), passes, delay);
    }

    @Override
    public String toString() {
      return reason + ": " + message;
    }
  }

  /** Says what became of a message, by the id that it has in its payload, if any. */
  private static void say(String event, Delivery message) {
    JsonElement id = null;
    try {
      if (JsonParser.parseString(message.getText()) instanceof JsonObject task) id = task.get("id");
    } catch (JsonParseException noJson) {
      // It has none.
    }
    var line = new LinkedHashMap<String, Object>();
    line.put("sequence", message.getStreamSequence());
    line.put("deliveries", message.getDeliveryCount());
    line.put("id", id);
    var headers = new TreeMap<String, List<String>>();
    message.getHeadersMap().forEach((name, values) -> headers.put(name, values.getValuesList()));
    if (!headers.isEmpty()) line.put("headers", headers);
    say(event, line);
  }

  /** Says one line on standard output, as JSON. */
  static void say(String event, Map<String, Object> more) {
    var line = new LinkedHashMap<String, Object>();
    line.put("event", event);
    line.putAll(more);
    System.out.println(new Gson().toJson(line));
    System.out.flush();
  }

  private static void log(Delivery message, String what) {
    System.err.println("message " + message.getStreamSequence() + " " + what);
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

  private static long clamp(long value, long least, long most) {
    return Math.max(least, Math.min(value, most));
  }

  private static <T, R> List<R> map(List<T> list, Function<T, R> with) {
    return list.stream().map(with).toList();
  }
}
