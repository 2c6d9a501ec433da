package io.fetchproxy.example;

import static io.fetchproxy.example.FetchProxy.now;

import io.fetchproxy.example.FetchProxy.Outcome;
import io.fetchproxy.example.FetchProxy.Trouble;
import io.fetchproxy.v1.ConsumeCredit;
import io.fetchproxy.v1.ConsumeKeep;
import io.fetchproxy.v1.ConsumeRequest;
import io.fetchproxy.v1.ConsumeResponse;
import io.fetchproxy.v1.ConsumeResult;
import io.fetchproxy.v1.ConsumeSettle;
import io.fetchproxy.v1.ConsumeStart;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.ExtendAction;
import io.fetchproxy.v1.Rejected;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ClientCallStreamObserver;
import io.grpc.stub.ClientResponseObserver;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;

/**
 * The loop with Consume: messages come and outcomes go on one stream, and many handlers run at
 * once, each in a thread. It must know nothing of the work.
 */
final class Consume {
  /** A stream without a frame for so many heartbeats is dead. So is a worker. */
  private static final int MISSED_BEATS = 3;

  /** The shortest heartbeat and the shortest lease that the proxy allows, in milliseconds. */
  private static final long SHORTEST = 1_000;

  /** A frame with more settlements is refused. */
  private static final int MOST_SETTLEMENTS = 1_000;

  /** The work on one message. Its thread is interrupted when the lease is lost. */
  interface Work {
    Outcome on(Delivery message);
  }

  private final FetchProxy proxy;
  private final ConsumeStart start;
  private final long grace;
  private final long beat;
  private final Work work;
  private final ExecutorService handlers = Executors.newCachedThreadPool();
  private final ScheduledExecutorService writer = Executors.newSingleThreadScheduledExecutor();

  // The lock of this object guards all that follows, and all that changes of a stream or a message.
  private final Set<Held> held = new LinkedHashSet<>();
  private final Set<Stream> open = new HashSet<>();
  private Stream current = new Stream(); // The stream that is open, or will be next.

  /**
   * Prepares the loop, for as many messages at once as {@code start} has credit for. If the worker
   * dies, others get its messages after {@code grace}, in milliseconds.
   */
  Consume(FetchProxy proxy, ConsumeStart.Builder start, long grace, Work work) {
    this.proxy = proxy;
    this.grace = Math.max(grace, SHORTEST);
    this.beat = Math.max(this.grace / MISSED_BEATS, SHORTEST);
    this.work = work;
    var keep = ConsumeKeep.newBuilder().setGrace(FetchProxy.duration(this.grace));
    this.start = start.setKeep(keep).setHeartbeat(FetchProxy.duration(beat)).build();
  }

  /** Returns when the proxy is stopped and every message is settled. Throws if it is refused. */
  synchronized void run() throws InterruptedException {
    proxy.stop.addListener(context -> stop(), Runnable::run);
    for (int failed = 0; ; ) {
      Stream stream = current;
      open.add(stream);
      stream.open();
      while (!stream.drains && !stream.ended) wait();
      // The next stream takes over from one that drains, which ends by itself.
      if (!stream.ended) continue;
      if (proxy.isStopped()) {
        while (!open.isEmpty()) wait();
        if (held.isEmpty()) return;
      }
      if (stream.opened) failed = 0;
      Trouble trouble = stream.trouble;
      if (trouble == null) continue;
      // The file may have a newer credential.
      if (stream.opened && trouble.reason().equals("UNAUTHENTICATED")) continue;
      if (!trouble.passes()) {
        List.copyOf(held).forEach(message -> message.lose(trouble));
        throw new IllegalStateException(trouble.toString());
      }
      pause(proxy.waitAfter(trouble, failed++));
    }
  }

  private synchronized void stop() {
    for (Stream stream : open) {
      if (stream.opened || !held.isEmpty()) stream.wake();
      else stream.cancel("stopped");
    }
    notifyAll();
  }

  /** Ends early when the proxy is stopped. */
  private void pause(long time) throws InterruptedException {
    boolean wasStopped = proxy.isStopped();
    long until = now() + time;
    while (now() < until && proxy.isStopped() == wasStopped) wait(until - now());
  }

  /** A message in hand. */
  private final class Held {
    final Delivery message;
    Stream stream; // Carries the settlement.
    long number; // The name of the message on this stream. 0: it came by an earlier stream.
    Future<?> task;
    Outcome outcome; // Null until the work is done.
    boolean gone; // Settled or lost.
    boolean isRejected; // The event was printed already.

    Held(Delivery message, Stream stream) {
      this.message = message;
      this.stream = stream;
      number = message.getNumber();
      held.add(this);
    }

    /** Runs in a thread of its own. */
    void work() {
      Outcome decided = work.on(message);
      synchronized (Consume.this) {
        decide(decided);
      }
    }

    void decide(Outcome decided) {
      outcome = decided;
      send();
    }

    /** Puts the message into the next frame. */
    void send() {
      if (gone) return;
      stream.ready.add(this);
      stream.wake();
    }

    /** The outcome, or an Extend if there is no outcome. */
    Settlement settlement() {
      var extend = ExtendAction.newBuilder().setLease(FetchProxy.duration(grace));
      var action =
          outcome != null ? outcome.action().clone() : Settlement.newBuilder().setExtend(extend);
      if (number != 0) return action.setNumber(number).build();
      return action.setToken(message.getToken()).build();
    }

    void lose(Trouble why) {
      if (gone) return;
      FetchProxy.log(message, "lost: " + why);
      goes("lost");
      if (task != null) task.cancel(true);
    }

    void goes(String event) {
      if (gone) return;
      gone = true;
      held.remove(this);
      stream.ready.remove(this);
      stream.wake();
      if (!isRejected) FetchProxy.say(event, message);
    }
  }

  /** One call of Consume. The library reads always, and calls this. */
  private final class Stream implements ClientResponseObserver<ConsumeRequest, ConsumeResponse> {
    private final Set<Held> ready = new LinkedHashSet<>(); // To be in the next frame.
    private final Map<Long, List<Held>> sent = new HashMap<>(); // Without a result, by frame.
    private ClientCallStreamObserver<ConsumeRequest> requests;
    private Future<?> beats;
    private long lastId;
    private long heard = now(); // The time of the last frame of the proxy.
    private int failed; // The number of frames in a row that must be repeated.
    private boolean started; // The first frame is written.
    private boolean closed; // Nothing more may be written.
    private boolean opened; // The proxy serves it.
    private boolean pausing; // The credit was set to 0.
    private boolean paused; // No message comes any more.
    private boolean drains;
    private boolean ended;
    private Trouble trouble; // Why it has ended. Null: an orderly end.

    void open() {
      heard = now();
      try {
        proxy.streaming().consume(this);
        beats = writer.scheduleAtFixedRate(this::beat, beat, beat, TimeUnit.MILLISECONDS);
      } catch (StatusRuntimeException unreadable) { // The files of credentials.
        onError(unreadable);
      }
    }

    @Override
    public void beforeStart(ClientCallStreamObserver<ConsumeRequest> requests) {
      this.requests = requests;
      requests.setOnReadyHandler(this::wake);
    }

    /** There is something to write. All that is there then goes into one frame. */
    void wake() {
      writer.execute(
          () -> {
            synchronized (Consume.this) {
              boolean hasNews = !started || !ready.isEmpty() || proxy.isStopped();
              if (hasNews && isWritable()) write();
            }
          });
    }

    private void beat() {
      synchronized (Consume.this) {
        if (closed) return;
        if (now() - heard > MISSED_BEATS * beat) {
          cancel("no frame for " + MISSED_BEATS * beat + " ms");
          return;
        }
        // The proxy keeps the leases of this stream, but not those that have outlived theirs.
        for (Held message : mine()) {
          if (message.number == 0 && message.outcome == null) message.send();
        }
        if (isWritable()) write();
      }
    }

    private boolean isWritable() {
      return requests != null && !closed && requests.isReady();
    }

    /** Sends all that is there to say: if nothing, a sign of life. */
    private void write() {
      var frame = ConsumeRequest.newBuilder();
      if (!started) frame.setStart(start);
      started = true;
      if (proxy.isStopped() && !pausing) {
        pausing = true;
        frame.setCredit(ConsumeCredit.newBuilder().setId(1).setMaxLeases(0));
      }
      List<Held> parts = ready.stream().limit(MOST_SETTLEMENTS).toList();
      if (!parts.isEmpty()) {
        var settle = ConsumeSettle.newBuilder().setId(++lastId);
        parts.forEach(message -> settle.addSettlements(message.settlement()));
        frame.setSettle(settle);
        sent.put(lastId, parts);
        parts.forEach(ready::remove);
        if (!ready.isEmpty()) wake();
      }
      requests.onNext(frame.build());
      if (pausing && paused && mine().isEmpty()) {
        closed = true;
        requests.onCompleted();
      }
    }

    void cancel(String why) {
      if (closed) return;
      closed = true;
      requests.cancel(why, null);
    }

    private List<Held> mine() {
      return held.stream().filter(message -> message.stream == this).toList();
    }

    @Override
    public void onNext(ConsumeResponse frame) {
      synchronized (Consume.this) {
        opened = true;
        heard = now();
        for (Delivery delivery : frame.getMessagesList()) {
          var message = new Held(delivery, this);
          message.task = handlers.submit(message::work);
        }
        frame.getRejectedList().forEach(this::refuse);
        frame.getResultsList().forEach(this::note);
        for (var end : frame.getEndedList()) {
          for (Held message : mine()) {
            if (message.number == end.getNumber()) message.lose(Trouble.of(end.getWhy()));
          }
        }
        if (frame.hasDraining()) {
          drains = true;
          current = new Stream();
          Consume.this.notifyAll();
        }
        if (frame.getCreditId() != 0) {
          paused = true;
          wake();
        }
      }
    }

    private void refuse(Rejected rejected) {
      Delivery message = FetchProxy.tellOf(rejected);
      if (message.getToken().isEmpty()) return;
      var leased = new Held(message, this);
      leased.isRejected = true;
      leased.decide(FetchProxy.outcomeOf(rejected));
    }

    /** Records the results of one frame. */
    private void note(ConsumeResult result) {
      List<Held> parts = sent.remove(result.getId());
      var again = new ArrayList<Held>();
      Trouble reason = null;
      for (int i = 0; i < parts.size(); i++) {
        SettleResult one =
            result.hasError()
                ? SettleResult.newBuilder().setError(result.getError()).build()
                : result.getResults(i);
        Trouble trouble = Trouble.of(one);
        if (trouble != null && trouble.passes()) {
          again.add(parts.get(i));
          reason = trouble;
        } else if (trouble != null) {
          parts.get(i).lose(trouble);
        } else if (one.getOutcome() != io.fetchproxy.v1.Outcome.OUTCOME_EXTENDED) {
          parts.get(i).goes(parts.get(i).outcome.event());
        }
      }
      if (reason == null) {
        failed = 0;
        return;
      }
      Runnable repeat =
          () -> {
            synchronized (Consume.this) {
              again.forEach(Held::send);
            }
          };
      writer.schedule(repeat, proxy.waitAfter(reason, failed++), TimeUnit.MILLISECONDS);
    }

    @Override
    public void onError(Throwable error) {
      end(Trouble.of((StatusRuntimeException) error));
    }

    @Override
    public void onCompleted() {
      end(null);
    }

    /** Hands what is left to the next stream: it is settled there by token, or extended. */
    private void end(Trouble why) {
      synchronized (Consume.this) {
        trouble = why;
        closed = true;
        ended = true;
        if (beats != null) beats.cancel(false);
        if (current == this) current = new Stream();
        for (Held message : mine()) {
          message.stream = current;
          message.number = 0;
          message.send();
        }
        open.remove(this);
        Consume.this.notifyAll();
      }
    }
  }
}
