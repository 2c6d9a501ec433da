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
import io.fetchproxy.v1.FetchServiceGrpc.FetchServiceStub;
import io.fetchproxy.v1.GiveBackRequest;
import io.fetchproxy.v1.NakAction;
import io.fetchproxy.v1.Rejected;
import io.fetchproxy.v1.RejectedCause;
import io.fetchproxy.v1.SettleError;
import io.fetchproxy.v1.SettleRequest;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.fetchproxy.v1.TermAction;
import io.grpc.ChannelCredentials;
import io.grpc.ClientInterceptor;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import io.grpc.util.AdvancedTlsX509KeyManager;
import java.io.File;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.FutureTask;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;

/**
 * The part of a worker around the generated client: a channel, a Fetch that is repeated until it is
 * answered, and its batch, with a keeper of the leases. Prints a JSON line for each event of a
 * message. It must know nothing of the work.
 */
final class FetchProxy {
  /** The largest answer to ask for. The received answer may be a little larger. */
  static final int MAX_BYTES = 16 << 20;

  // All times are in milliseconds.
  /** The first wait before a call is repeated. */
  private static final long FIRST_WAIT = 100;

  private static final long LONGEST_WAIT = 5_000;

  /** A Fetch has this time in addition to its max_wait. The proxy answers well before. */
  private static final long PATIENCE = 5_000;

  /** After an empty answer that came sooner, the worker waits for the rest of this time. */
  private static final long TOO_SOON = 500;

  /** How long an outcome may wait for others, to be settled in the same call. */
  private static final long GATHER = 100;

  private static final long HOUR = 3_600_000;

  /** With these codes the same call would be refused again. */
  private static final Set<Status.Code> REFUSALS =
      Set.of(
          Status.Code.INVALID_ARGUMENT,
          Status.Code.NOT_FOUND,
          Status.Code.FAILED_PRECONDITION,
          Status.Code.PERMISSION_DENIED,
          Status.Code.UNAUTHENTICATED,
          Status.Code.UNIMPLEMENTED);

  private static final String CA = System.getenv("FETCH_PROXY_CA");
  private static final String CERT = System.getenv("FETCH_PROXY_CERT");
  private static final String KEY = System.getenv("FETCH_PROXY_KEY");
  private static final String BEARER_FILE = System.getenv("FETCH_PROXY_BEARER_FILE");
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  /** The addresses to which a token may be sent: nobody on the way can read it. */
  private static final String PROTECTED =
      "(https:|(dns:///)?(localhost|127\\.0\\.0\\.1|\\[::1]):).*";

  private final AdvancedTlsX509KeyManager identity = new AdvancedTlsX509KeyManager();
  private final ManagedChannel channel;
  private final FetchServiceBlockingStub stub;
  final Context.CancellableContext stop = Context.ROOT.withCancellation();
  private final CountDownLatch stopped = new CountDownLatch(1);

  /**
   * Connects to {@code host:port}, to {@code https://host:port} with TLS, or to every address of
   * {@code dns:///name:port}. The environment names the files of its credentials.
   */
  FetchProxy(String address) throws IOException {
    if (BEARER_FILE != null && !address.matches(PROTECTED)) {
      throw new IllegalArgumentException(
          "a credential is not sent to " + address + " without TLS: use https://");
    }
    boolean hasTls = address.startsWith("https://");
    var credentials = hasTls ? tls() : InsecureChannelCredentials.create();
    channel =
        Grpc.newChannelBuilder(address.replace("https://", ""), credentials)
            .defaultLoadBalancingPolicy("round_robin")
            .maxInboundMessageSize(MAX_BYTES + (1 << 20))
            .keepAliveTime(30, TimeUnit.SECONDS)
            .keepAliveWithoutCalls(true)
            .build();
    stub = FetchServiceGrpc.newBlockingStub(channel);
  }

  private ChannelCredentials tls() throws IOException {
    var tls = TlsChannelCredentials.newBuilder();
    if (CA != null) tls.trustManager(new File(CA));
    if (CERT != null) tls.keyManager(identity);
    return tls.build();
  }

  /** Ends the fetching, from any thread, and gives back all messages that are not begun. */
  void stop() {
    stop.cancel(null);
    stopped.countDown();
  }

  boolean isStopped() {
    return stop.isCancelled();
  }

  /**
   * Repeats the call until it is answered, and throws if it is permanently refused. The repeats
   * have one name, so they get the messages of an answer that was lost.
   *
   * @return an empty batch if stopped
   */
  Batch fetch(FetchRequest request) throws Exception {
    var attempt = request.toBuilder().setAttemptId(UUID.randomUUID().toString());
    for (int failed = 0; !isStopped(); failed++) {
      long began = now();
      try {
        var call = within(millis(request.getMaxWait()) + PATIENCE);
        FetchResponse answer = stop.call(() -> call.fetch(attempt.build()));
        boolean nothing = answer.getMessagesCount() + answer.getRejectedCount() == 0;
        if (nothing) pause(TOO_SOON - (now() - began));
        return new Batch(answer);
      } catch (StatusRuntimeException error) {
        Trouble trouble = Trouble.of(error);
        if (isStopped()) break;
        if (!trouble.passes) throw new IllegalStateException(trouble.toString(), error);
        attempt.setAttemptAgain(true);
        pause(waitAfter(trouble, failed));
      }
    }
    giveBack(attempt.build());
    return new Batch(FetchResponse.getDefaultInstance());
  }

  /**
   * Returns the messages of a Fetch whose answer nobody reads. If it fails, they come back when
   * their leases end.
   */
  private void giveBack(FetchRequest attempt) {
    var request =
        GiveBackRequest.newBuilder()
            .setStream(attempt.getStream())
            .setConsumer(attempt.getConsumer())
            .setAttemptId(attempt.getAttemptId());
    try {
      within(1_000).giveBack(request.build());
    } catch (StatusRuntimeException error) {
      System.err.println("the last Fetch is not given back: " + error.getMessage());
    }
  }

  private void pause(long time) throws InterruptedException {
    stopped.await(time, TimeUnit.MILLISECONDS);
  }

  private FetchServiceBlockingStub within(long timeout) {
    return stub.withDeadlineAfter(timeout, TimeUnit.MILLISECONDS).withInterceptors(credentials());
  }

  /** The stub for a stream, which has no deadline. */
  FetchServiceStub streaming() {
    return FetchServiceGrpc.newStub(channel).withInterceptors(credentials());
  }

  /** Reads the files of credentials for each call, because they may have changed. */
  private ClientInterceptor credentials() {
    var headers = new Metadata();
    try {
      if (CERT != null) identity.updateIdentityCredentials(new File(CERT), new File(KEY));
      if (BEARER_FILE != null) {
        headers.put(AUTHORIZATION, "Bearer " + Files.readString(Path.of(BEARER_FILE)).strip());
      }
    } catch (IOException | GeneralSecurityException error) {
      throw Status.UNAVAILABLE.withDescription(error.toString()).asRuntimeException();
    }
    return MetadataUtils.newAttachHeadersInterceptor(headers);
  }

  /**
   * Returns how long to wait before the call is repeated, and prints it. The wait is partly random,
   * because workers that failed together must not come back together.
   */
  long waitAfter(Trouble trouble, int failed) {
    long most = Math.min(FIRST_WAIT << Math.min(failed, 6), LONGEST_WAIT);
    long wait = Math.min(trouble.delay, LONGEST_WAIT);
    wait += most / 2 + ThreadLocalRandom.current().nextLong(most / 2);
    var message = String.valueOf(trouble.message);
    say("retry", Map.of("reason", trouble.reason, "message", message, "in", wait / 1e3));
    // By itself, the channel would wait for up to two minutes before it connects again.
    channel.resetConnectBackoff();
    return wait;
  }

  /** For a temporary failure: the message comes back after the delay, in milliseconds. */
  static final class Transient extends Exception {
    final long delay;

    Transient(long delay) {
      this.delay = delay;
    }
  }

  /** For a permanent failure: the message does not come back. */
  static final class Poison extends Exception {
    Poison(String reason) {
      super(reason);
    }
  }

  /**
   * The messages of one Fetch. Only its keeper calls Settle. The keeper extends the leases and
   * settles the outcomes until every lease is gone. So no outcome waits for the work on another
   * message.
   */
  final class Batch {
    final List<Lease> leases;
    private final List<Lease> kept; // The leases that are not gone.
    private final FutureTask<Void> keeper = new FutureTask<>(this::keep);
    private final Context.CancellationListener stopping = context -> giveBack();

    private Batch(FetchResponse answer) {
      leases = map(answer.getMessagesList(), m -> new Lease(this, m, millis(m.getLease())));
      kept = new ArrayList<>(leases);
      answer.getRejectedList().forEach(this::refuse);
      stop.addListener(stopping, Runnable::run); // At once if it is stopped already.
      new Thread(keeper, "keeper").start();
    }

    /** Settles a rejected message that is still leased to this worker. */
    private void refuse(Rejected rejected) {
      Delivery message = tellOf(rejected);
      if (message.getToken().isEmpty()) return;
      var lease = new Lease(this, message, millis(rejected.getLease()));
      lease.isRejected = true;
      kept.add(lease);
      lease.decide(outcomeOf(rejected));
    }

    /** Waits until every lease is settled or lost. */
    void await() throws Exception {
      keeper.get();
    }

    private Void keep() throws InterruptedException {
      while (awaitTurn()) turn();
      stop.removeListener(stopping);
      return null;
    }

    /** Waits until there is something to do. Returns false if every lease is gone. */
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

    /** Settles and extends all leases that are due, in one call. */
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

    /** Records the failure of the call, or the results of its parts. */
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

    /** Naks all messages that are not begun. A Nak would end a last attempt, so it is left out. */
    private synchronized void giveBack() {
      for (Lease lease : leases) {
        if (!lease.begun && !lease.isLastAttempt()) lease.decide(Outcome.returned());
      }
    }
  }

  /** The action for a lease in one call. */
  private record Part(Lease lease, Settlement settlement, long ends) {}

  /** A message in hand, and the right to settle it until the lease ends. */
  static final class Lease {
    final Delivery message;
    private final Batch batch; // Its lock guards all following fields.
    private boolean begun;
    private boolean gone;
    private long ends;
    private long next; // When to extend or settle it.
    private int failed; // The number of failed calls in a row.
    private Settlement outcome; // The outcome, once decided.
    private String event; // The event to print when it is settled.
    private boolean isRejected; // The event was printed already.

    private Lease(Batch batch, Delivery message, long left) {
      this.batch = batch;
      this.message = message;
      lasts(now(), left);
    }

    /** Whether to work on the message. False if the message is lost or given back. */
    boolean begin() {
      synchronized (batch) {
        begun = !gone && outcome == null && !isOver();
        return begun;
      }
    }

    /** The keeper settles the message. */
    void decide(Outcome decided) {
      synchronized (batch) {
        if (gone || outcome != null) return;
        event = decided.event;
        outcome = decided.action.setToken(message.getToken()).build();
        failed = 0;
        boolean isLast = batch.kept.stream().noneMatch(lease -> lease.outcome == null);
        next = isLast ? now() : now() + GATHER;
        batch.notifyAll();
      }
    }

    /** Includes a lease that is due soon. A lease whose call failed waits for its full time. */
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

    /** The outcome, or an Extend if there is no outcome. */
    private Settlement settlement() {
      if (outcome != null) return outcome;
      // Without a length, the lease lasts as long as it was granted.
      var extend = ExtendAction.getDefaultInstance();
      return Settlement.newBuilder().setToken(message.getToken()).setExtend(extend).build();
    }

    private void lasts(long from, long left) {
      ends = from + left;
      failed = 0;
      // Otherwise the outcome was decided in the meantime.
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

  /**
   * Says how a message is settled.
   *
   * @param event the event to print then
   * @param action without the name of the message
   */
  record Outcome(String event, Settlement.Builder action) {
    /** The message is done. */
    static Outcome ack() {
      var ack = AckAction.getDefaultInstance();
      return new Outcome("acked", Settlement.newBuilder().setAck(ack));
    }

    // One settlement that the proxy refuses would fail the whole call.

    /** The message is to come back after the delay, in milliseconds. */
    static Outcome nak(long delay) {
      var nak = NakAction.newBuilder().setDelay(duration(clamp(delay, 0, 24 * HOUR)));
      return new Outcome("nacked", Settlement.newBuilder().setNak(nak));
    }

    /** The message is not to come back. The reason is cut to 1 KiB, between two characters. */
    static Outcome term(String reason) {
      byte[] bytes = String.valueOf(reason).getBytes(StandardCharsets.UTF_8);
      int end = Math.min(bytes.length, 1_024);
      while (end < bytes.length && (bytes[end] & 0xC0) == 0x80) end--;
      var term = TermAction.newBuilder().setReasonBytes(ByteString.copyFrom(bytes, 0, end));
      return new Outcome("termed", Settlement.newBuilder().setTerm(term));
    }

    /** Nobody has begun the message. */
    private static Outcome returned() {
      return new Outcome("returned", nak(0).action);
    }
  }

  /** Prints a rejected message. It is still leased to this worker if it has a token. */
  static Delivery tellOf(Rejected rejected) {
    var message =
        Delivery.newBuilder()
            .setToken(rejected.getToken())
            .setNumber(rejected.getNumber())
            .setStreamSequence(rejected.getStreamSequence())
            .setDeliveryCount(rejected.getDeliveryCount())
            .putAllHeaders(rejected.getHeadersMap())
            .build();
    log(message, "rejected: " + rejected.getDetail());
    say("rejected", message);
    return message;
  }

  /** Another worker may accept larger answers. Nobody can read what is not JSON. */
  static Outcome outcomeOf(Rejected rejected) {
    boolean tooLarge = rejected.getCause() == RejectedCause.REJECTED_CAUSE_TOO_LARGE;
    return tooLarge ? Outcome.nak(60_000) : Outcome.term(rejected.getDetail());
  }

  /**
   * The meaning of an error for its call.
   *
   * @param passes whether to repeat the call
   * @param delay the least wait, if the proxy names a wait
   */
  record Trouble(String reason, String message, boolean passes, long delay) {
    /** An error without a reason comes from a transport on the way: only its code counts. */
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
        // Treat it as missing.
      }
      String message = error.getStatus().getDescription();
      // The causes of a failed connection are not in its description.
      for (Throwable cause = error.getCause(); cause != null; cause = cause.getCause()) {
        message += ": " + cause.getMessage();
      }
      return new Trouble(reason, message, !REFUSALS.contains(code), delay);
    }

    /** Null if all is well. */
    static Trouble of(SettleResult result) {
      return result.hasError() ? of(result.getError()) : null;
    }

    static Trouble of(SettleError error) {
      boolean passes = error.hasRetryDelay() || error.getReason().equals("SETTLE_UNCONFIRMED");
      long delay = millis(error.getRetryDelay());
      return new Trouble(error.getReason(), error.getMessage(), passes, delay);
    }

    @Override
    public String toString() {
      return reason + ": " + message;
    }
  }

  /** Prints the outcome of a message, with the id of its payload, if there is one. */
  static void say(String event, Delivery message) {
    JsonElement id = null;
    try {
      if (JsonParser.parseString(message.getText()) instanceof JsonObject task) id = task.get("id");
    } catch (JsonParseException noJson) {
      // The payload has no id.
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

  /** Prints one line of JSON to standard output. */
  static void say(String event, Map<String, Object> more) {
    var line = new LinkedHashMap<String, Object>();
    line.put("event", event);
    line.putAll(more);
    System.out.println(new Gson().toJson(line));
    System.out.flush();
  }

  static void log(Delivery message, String what) {
    System.err.println("message " + message.getStreamSequence() + " " + what);
  }

  static Duration duration(long millis) {
    int nanos = (int) (millis % 1_000) * 1_000_000;
    return Duration.newBuilder().setSeconds(millis / 1_000).setNanos(nanos).build();
  }

  private static long millis(Duration duration) {
    return duration.getSeconds() * 1_000 + duration.getNanos() / 1_000_000;
  }

  static long now() {
    return System.nanoTime() / 1_000_000;
  }

  private static long clamp(long value, long least, long most) {
    return Math.max(least, Math.min(value, most));
  }

  private static <T, R> List<R> map(List<T> list, Function<T, R> with) {
    return list.stream().map(with).toList();
  }
}
