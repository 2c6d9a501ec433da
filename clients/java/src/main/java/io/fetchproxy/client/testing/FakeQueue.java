package io.fetchproxy.client.testing;

import com.google.protobuf.ByteString;
import com.google.protobuf.Duration;
import com.google.protobuf.Timestamp;
import io.fetchproxy.v1.Codec;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.HeaderValues;
import io.fetchproxy.v1.Outcome;
import io.fetchproxy.v1.Rejected;
import io.fetchproxy.v1.RejectedCause;
import io.fetchproxy.v1.SettleError;
import io.fetchproxy.v1.SettleResult;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.HashMap;
import java.util.HashSet;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;

/**
 * The messages and their leases. The lock of this object guards all that changes in the fake. It
 * must know nothing of calls.
 */
final class FakeQueue {
  final List<FakeMessage> messages = new ArrayList<>();
  int maxDeliver;
  long ackWait = 30_000;
  private final ScheduledExecutorService timer;
  private final TreeSet<Long> ready = new TreeSet<>(); // Sequences, the lowest first.
  private final Map<String, Lease> leases = new HashMap<>();
  private final Set<Watcher> watchers = new LinkedHashSet<>();
  private final Set<String> over = new HashSet<>(); // Attempts that were given back.
  private final Deque<String> failures = new ArrayDeque<>(); // Of the next settlements.
  private long delivered;

  FakeQueue(ScheduledExecutorService timer) {
    this.timer = timer;
  }

  /** Hears of changes. Called with the lock. */
  interface Watcher {
    /** There may be a message to take. */
    void filled();

    /** A lease has ended in another way than by a settlement. */
    void ended(Lease lease);
  }

  /** The right to settle one attempt. */
  final class Lease {
    final FakeMessage message;
    final int attempt;
    final String token;
    final String name; // The attempt of the Fetch.
    private final long granted;
    private long ends;
    private Settlement settled;
    private boolean lapsed;

    private Lease(FakeMessage message, String name, long granted) {
      this.message = message;
      this.name = name;
      this.granted = granted;
      attempt = message.delivered;
      token = "fake-" + message.sequence() + "-" + delivered;
    }

    /** Lets it end after so many milliseconds. */
    void lasts(long millis) {
      ends = now() + millis;
      timer.schedule(this::lapseIfOver, millis, TimeUnit.MILLISECONDS);
    }

    private void lapseIfOver() {
      synchronized (FakeQueue.this) {
        if (now() >= ends) lapse();
      }
    }

    boolean isOpen() {
      return settled == null && !lapsed;
    }

    /** Gives the message to the next caller. */
    void lapse() {
      if (!isOpen()) return;
      lapsed = true;
      comesBack(message);
      List.copyOf(watchers).forEach(watcher -> watcher.ended(this));
    }

    /** Takes the attempt back, as if the message had not been delivered. */
    void giveBack() {
      if (!isOpen()) return;
      lapsed = true;
      message.delivered--;
      comesBack(message);
    }

    private SettleResult extend(long millis) {
      lasts(millis);
      var lease = Duration.newBuilder().setSeconds(millis / 1_000);
      return SettleResult.newBuilder()
          .setOutcome(Outcome.OUTCOME_EXTENDED)
          .setLease(lease.setNanos((int) (millis % 1_000) * 1_000_000))
          .build();
    }

    private SettleResult settle(Settlement how) {
      settled = how;
      message.settled.add(how);
      if (how instanceof Settlement.Nak) comesBack(message);
      else end(message);
      return SettleResult.newBuilder().setOutcome(Outcome.OUTCOME_CONFIRMED).build();
    }
  }

  static long now() {
    return System.nanoTime() / 1_000_000;
  }

  synchronized FakeMessage publish(
      ByteString payload, String subject, Map<String, List<String>> headers) {
    var message = new FakeMessage(this, messages.size() + 1, payload, subject, headers);
    messages.add(message);
    ready.add(message.sequence());
    changed();
    return message;
  }

  void watch(Watcher watcher) {
    watchers.add(watcher);
  }

  void forget(Watcher watcher) {
    watchers.remove(watcher);
  }

  /** The next message. Null if there is none. */
  Lease take(String name, long lease) {
    Long sequence = ready.pollFirst();
    if (sequence == null) return null;
    FakeMessage message = messages.get((int) (sequence - 1));
    message.delivered++;
    delivered++;
    var taken = new Lease(message, name, lease);
    leases.put(taken.token, taken);
    taken.lasts(lease);
    return taken;
  }

  /** The open leases of a Fetch. */
  List<Lease> ofAttempt(String name) {
    var open = leases.values().stream().filter(Lease::isOpen);
    return open.filter(lease -> lease.name.equals(name)).toList();
  }

  boolean isOver(String name) {
    return over.contains(name);
  }

  /** Returns how many messages were given back. */
  synchronized int giveBack(String name) {
    over.add(name);
    List<Lease> given = ofAttempt(name);
    given.forEach(Lease::giveBack);
    notifyAll();
    return given.size();
  }

  /** Ends the lease of a message, as if another worker had it. */
  synchronized void expire(FakeMessage message) {
    var open = leases.values().stream().filter(lease -> lease.message == message);
    var lease = open.filter(Lease::isOpen).findFirst();
    lease.orElseThrow(() -> new IllegalStateException("the message is not leased")).lapse();
  }

  /** Lets the next settlement fail. */
  synchronized void fail(String reason) {
    Reasons.codeOf(reason);
    failures.add(reason);
  }

  synchronized SettleResult settle(String token, io.fetchproxy.v1.Settlement action) {
    Lease lease = leases.get(token);
    if (lease == null) return error("TOKEN_INVALID", "the token is not from this fake");
    Settlement how = how(action);
    if (how != null && !failures.isEmpty()) return error(failures.poll(), "the test wants it so");
    if (lease.settled != null) {
      boolean same = how != null && how.getClass() == lease.settled.getClass();
      if (!same) return error("LEASE_SETTLED", "the message was settled in another way");
      return SettleResult.newBuilder().setOutcome(Outcome.OUTCOME_DUPLICATE).build();
    }
    if (lease.lapsed) return error("LEASE_EXPIRED", "the lease has ended");
    if (how != null) return lease.settle(how);
    var extend = action.getExtend();
    return lease.extend(extend.hasLease() ? millis(extend.getLease()) : lease.granted);
  }

  /** Null for an Extend. */
  private static Settlement how(io.fetchproxy.v1.Settlement action) {
    return switch (action.getActionCase()) {
      case ACK -> new Settlement.Ack();
      case NAK ->
          new Settlement.Nak(java.time.Duration.ofMillis(millis(action.getNak().getDelay())));
      case TERM -> new Settlement.Term(action.getTerm().getReason());
      default -> null;
    };
  }

  static long millis(Duration duration) {
    return duration.getSeconds() * 1_000 + duration.getNanos() / 1_000_000;
  }

  static SettleResult error(String reason, String text) {
    var error = SettleError.newBuilder().setReason(reason).setMessage(text);
    if (Reasons.isWorthAWait(reason)) error.setRetryDelay(Reasons.WAIT);
    return SettleResult.newBuilder().setError(error).build();
  }

  /** Null if the payload is as the codec wants it. Otherwise the message is terminated. */
  Rejected refused(Lease lease, Codec codec) {
    FakeMessage message = lease.message;
    boolean text = codec == Codec.CODEC_TEXT || codec == Codec.CODEC_JSON;
    String fault = null;
    if (text && !message.payload.isValidUtf8()) fault = "the payload is not UTF-8";
    else if (codec == Codec.CODEC_JSON && !hasNoPayload(message)) {
      boolean valid = Json.isValid(message.payload.toStringUtf8());
      if (!valid) fault = "the payload is not JSON";
    }
    if (fault == null) return null;
    lease.settle(new Settlement.Term(fault));
    return Rejected.newBuilder()
        .setCause(RejectedCause.REJECTED_CAUSE_CODEC)
        .setDetail(fault)
        .setSubject(message.subject)
        .setStreamSequence(message.sequence())
        .setDeliveryCount(lease.attempt)
        .setSize(message.payload.size())
        .setData(message.payload)
        .putAllHeaders(headers(message))
        .build();
  }

  /** A codec does not judge a payload that was never delivered. */
  private static boolean hasNoPayload(FakeMessage message) {
    return message.payload.isEmpty()
        && (message.headers.containsKey("Nats-Msg-Size")
            || message.headers.containsKey("Nats-Marker-Reason")
            || message.headers.containsKey("KV-Operation"));
  }

  Delivery delivery(Lease lease, Codec codec, long number) {
    FakeMessage message = lease.message;
    var delivery =
        Delivery.newBuilder()
            .setToken(lease.token)
            .setNumber(number)
            .setSubject(message.subject)
            .putAllHeaders(headers(message))
            .setStreamSequence(message.sequence())
            .setConsumerSequence(delivered)
            .setDeliveryCount(lease.attempt)
            .setMaxDeliver(maxDeliver)
            .setPending(ready.size())
            .setPublishTime(
                Timestamp.newBuilder()
                    .setSeconds(message.published.getEpochSecond())
                    .setNanos(message.published.getNano()))
            .setLease(
                Duration.newBuilder()
                    .setSeconds(lease.granted / 1_000)
                    .setNanos((int) (lease.granted % 1_000) * 1_000_000));
    boolean text = codec == Codec.CODEC_TEXT || codec == Codec.CODEC_JSON;
    if (text) delivery.setTextBytes(message.payload);
    else delivery.setData(message.payload);
    return delivery.build();
  }

  private static Map<String, HeaderValues> headers(FakeMessage message) {
    var headers = new HashMap<String, HeaderValues>();
    message.headers.forEach(
        (name, values) ->
            headers.put(name, HeaderValues.newBuilder().addAllValues(values).build()));
    return headers;
  }

  private void comesBack(FakeMessage message) {
    if (maxDeliver > 0 && message.delivered >= maxDeliver) {
      end(message);
      return;
    }
    ready.add(message.sequence());
    changed();
  }

  private void end(FakeMessage message) {
    message.ended = true;
    notifyAll();
  }

  private void changed() {
    notifyAll();
    List.copyOf(watchers).forEach(Watcher::filled);
  }
}
