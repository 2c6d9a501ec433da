package io.fetchproxy.client.testing;

import io.fetchproxy.client.testing.FakeQueue.Lease;
import io.fetchproxy.v1.ConsumeCredit;
import io.fetchproxy.v1.ConsumeEnded;
import io.fetchproxy.v1.ConsumeOpened;
import io.fetchproxy.v1.ConsumeRequest;
import io.fetchproxy.v1.ConsumeResponse;
import io.fetchproxy.v1.ConsumeResult;
import io.fetchproxy.v1.ConsumeSettle;
import io.fetchproxy.v1.ConsumeStart;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.Future;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;

/** One call of Consume. The lock of the queue guards all that changes. */
final class FakeStream implements StreamObserver<ConsumeRequest>, FakeQueue.Watcher {
  private static final long LONGEST_LEASE = 3_600_000;
  private static final long BEAT = 10_000;

  private final FakeQueue queue;
  private final ScheduledExecutorService timer;
  private final ServerCallStreamObserver<ConsumeResponse> call;
  private final Map<Long, Lease> held = new TreeMap<>(); // By number.
  private ConsumeStart start;
  private Future<?> beats;
  private long lastNumber;
  private int maxLeases = 1;
  private long maxBytes = 16 << 20;
  private boolean closed;

  FakeStream(
      FakeQueue queue,
      ScheduledExecutorService timer,
      ServerCallStreamObserver<ConsumeResponse> call) {
    this.queue = queue;
    this.timer = timer;
    this.call = call;
  }

  void open() {
    call.setOnCancelHandler(this::end);
  }

  void refuse(Throwable failure) {
    closed = true;
    call.onError(failure);
  }

  @Override
  public void onNext(ConsumeRequest frame) {
    synchronized (queue) {
      if (closed) return;
      if (frame.hasStart()) begin(frame.getStart());
      if (frame.hasCredit()) note(frame.getCredit());
      if (frame.hasSettle()) settle(frame.getSettle());
      filled();
    }
  }

  private void begin(ConsumeStart start) {
    this.start = start;
    if (start.hasCredit()) note(start.getCredit());
    var opened = ConsumeOpened.newBuilder().setMaxLeases(maxLeases).setMaxBytes(maxBytes);
    send(ConsumeResponse.newBuilder().setOpened(opened));
    queue.watch(this);
    long beat = start.hasHeartbeat() ? FakeQueue.millis(start.getHeartbeat()) : BEAT;
    beats = timer.scheduleAtFixedRate(this::beat, beat, beat, TimeUnit.MILLISECONDS);
  }

  private void beat() {
    synchronized (queue) {
      send(ConsumeResponse.newBuilder());
    }
  }

  private void note(ConsumeCredit credit) {
    if (credit.hasMaxLeases()) maxLeases = credit.getMaxLeases();
    if (credit.hasMaxBytes()) maxBytes = credit.getMaxBytes();
    if (credit.getId() != 0) send(ConsumeResponse.newBuilder().setCreditId(credit.getId()));
  }

  private void settle(ConsumeSettle settle) {
    var result = ConsumeResult.newBuilder().setId(settle.getId());
    int failed = 0;
    for (Settlement part : settle.getSettlementsList()) {
      SettleResult one = settled(part);
      if (one.hasError()) failed++;
      result.addResults(one);
    }
    held.values().removeIf(lease -> !lease.isOpen());
    send(ConsumeResponse.newBuilder().addResults(result.setFailed(failed)));
  }

  private SettleResult settled(Settlement part) {
    if (part.getNumber() == 0) return queue.settle(part.getToken(), part);
    Lease lease = held.get(part.getNumber());
    if (lease != null) return queue.settle(lease.token, part);
    return FakeQueue.error("LEASE_EXPIRED", "no message has this number");
  }

  @Override
  public void filled() {
    if (closed || start == null) return;
    while (held.size() < maxLeases && bytes() < maxBytes) {
      Lease lease = queue.take("", lease());
      if (lease == null) return;
      var refused = queue.refused(lease, start.getCodec());
      if (refused != null) {
        send(ConsumeResponse.newBuilder().addRejected(refused));
        continue;
      }
      held.put(++lastNumber, lease);
      var delivery = queue.delivery(lease, start.getCodec(), lastNumber);
      send(ConsumeResponse.newBuilder().addMessages(delivery));
    }
  }

  private long bytes() {
    return held.values().stream().mapToLong(lease -> lease.message.payload.size()).sum();
  }

  private long lease() {
    if (start.hasLease()) return FakeQueue.millis(start.getLease());
    if (!start.hasKeep()) return queue.ackWait;
    var keep = start.getKeep();
    return keep.hasAtMost() ? FakeQueue.millis(keep.getAtMost()) : LONGEST_LEASE;
  }

  @Override
  public void ended(Lease lease) {
    for (var one : List.copyOf(held.entrySet())) {
      if (one.getValue() != lease) continue;
      held.remove(one.getKey());
      var why = FakeQueue.error("LEASE_EXPIRED", "the lease has ended").getError();
      var ended = ConsumeEnded.newBuilder().setNumber(one.getKey()).setWhy(why);
      send(ConsumeResponse.newBuilder().addEnded(ended));
    }
  }

  private void send(ConsumeResponse.Builder frame) {
    if (!closed) call.onNext(frame.build());
  }

  @Override
  public void onError(Throwable cancelled) {
    end();
  }

  @Override
  public void onCompleted() {
    synchronized (queue) {
      if (closed) return;
      end();
      call.onCompleted();
    }
  }

  /** Messages come back after the grace of the stream. */
  private void end() {
    synchronized (queue) {
      if (closed) return;
      closed = true;
      queue.forget(this);
      if (beats != null) beats.cancel(false);
      if (start == null || !start.hasKeep()) return;
      long grace = FakeQueue.millis(start.getKeep().getGrace());
      held.values().forEach(lease -> lease.lasts(grace));
    }
  }
}
