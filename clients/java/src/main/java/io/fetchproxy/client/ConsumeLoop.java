package io.fetchproxy.client;

import io.fetchproxy.v1.ConsumeCredit;
import io.fetchproxy.v1.ConsumeKeep;
import io.fetchproxy.v1.ConsumeRequest;
import io.fetchproxy.v1.ConsumeResponse;
import io.fetchproxy.v1.ConsumeResult;
import io.fetchproxy.v1.ConsumeSettle;
import io.fetchproxy.v1.ConsumeStart;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.ExtendAction;
import io.fetchproxy.v1.Outcome;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.grpc.Status;
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
import java.util.concurrent.Future;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/** Messages come and outcomes go on one stream. It must know nothing of handlers. */
final class ConsumeLoop extends Loop {
  /** A stream without a frame for so many heartbeats is dead. So is a worker. */
  private static final int MISSED_BEATS = 3;

  /** The shortest heartbeat and the shortest lease that the proxy allows, in milliseconds. */
  private static final long SHORTEST = 1_000;

  /** A frame with more settlements is refused. */
  private static final int MOST_SETTLEMENTS = 1_000;

  private final ConsumeStart start;
  private final long grace;
  private final long beat;
  private final ScheduledThreadPoolExecutor writer =
      new ScheduledThreadPoolExecutor(
          1, Threads.named("fetchproxy-writer"), new ThreadPoolExecutor.DiscardPolicy());

  // The lock of the loop guards all that follows, and all that changes of a stream or a message.
  private long heard = Times.now(); // When the last frame of any stream came.
  private final Set<Stream> open = new HashSet<>();
  private Stream current = new Stream(); // The stream that is open, or will be next.

  ConsumeLoop(Options options, Events events, Work<?> work) {
    super(options, events, work);
    grace = options.grace.toMillis();
    beat = Math.max(grace / MISSED_BEATS, SHORTEST);
    start =
        ConsumeStart.newBuilder()
            .setStream(options.stream)
            .setConsumer(options.consumer)
            .setKeep(
                ConsumeKeep.newBuilder()
                    .setGrace(Times.duration(grace))
                    .setAtMost(Times.duration(options.atMost)))
            .setHeartbeat(Times.duration(beat))
            .setMaxFrameBytes((int) Math.min(options.maxBytes, Connection.MAX_BYTES))
            .setCodec(options.codec)
            .setWorker(options.name)
            .build();
  }

  @Override
  synchronized void run() throws InterruptedException {
    for (int failed = 0; ; ) {
      Stream stream = current;
      open.add(stream);
      stream.open();
      while (!stream.drains && !stream.ended) wait();
      // The next stream takes over from one that drains, which ends by itself.
      if (!stream.ended) continue;
      if (isStopping()) {
        while (!open.isEmpty()) wait();
        if (Times.now() - heard > grace && stream.trouble != null) loseAll(stream.trouble);
        if (held.isEmpty()) return;
      }
      if (stream.opened) failed = 0;
      FetchProxyException trouble = stream.trouble;
      if (trouble == null) continue;
      // The file may have a newer credential.
      if (stream.opened && trouble.reason().equals("UNAUTHENTICATED")) continue;
      if (!trouble.isRepeatable()) {
        loseAll(trouble);
        throw trouble;
      }
      pause(waitAfter(trouble, failed++));
    }
  }

  @Override
  void stopTaking() {
    for (Stream stream : open) {
      if (stream.opened || !held.isEmpty()) stream.wake();
      else stream.cancel("stopped");
    }
  }

  @Override
  void placesChanged() {
    if (current.lastPlaces != places()) current.wake();
  }

  @Override
  void close() {
    super.close();
    synchronized (this) {
      List.copyOf(open).forEach(stream -> stream.cancel("the worker ends"));
    }
    writer.shutdownNow();
  }

  /** A message, and the stream that carries its settlement. */
  private final class Carried extends Held {
    private Stream stream;
    private long number; // The name of the message on this stream. 0: it came by an earlier stream.
    private long ends = Long.MAX_VALUE; // The end of the lease, if no stream keeps it.

    Carried(Delivery delivery, Stream stream) {
      super(delivery);
      this.stream = stream;
      number = delivery.getNumber();
      stream.mine.add(this);
    }

    @Override
    void decided() {
      send();
    }

    @Override
    void left() {
      stream.mine.remove(this);
      stream.ready.remove(this);
      stream.wake();
    }

    /** While a stream keeps the lease, the proxy says when it ends. */
    @Override
    boolean isOver() {
      return Math.min(keptUntil, ends) <= Times.now();
    }

    /** No stream keeps the lease, so it ends by the clock. */
    void ends(long end) {
      ends = end;
      long wait = Math.max(end - Times.now(), 0) + 1;
      writer.schedule(this::lapse, wait, TimeUnit.MILLISECONDS);
    }

    /** Without an outcome only: an outcome may have reached the proxy. */
    private void lapse() {
      synchronized (ConsumeLoop.this) {
        if (ends > Times.now() || !isUndecided()) return;
        lose(FetchProxyException.lost("no stream has reached the proxy while the lease lasted"));
      }
    }

    /** Puts the message into the next frame. */
    void send() {
      if (isGone()) return;
      stream.ready.add(this);
      stream.wake();
    }

    /** The outcome, or an Extend if there is no outcome. */
    Settlement settlement() {
      var action = outcome() != null ? outcome().action().clone() : extension();
      if (number != 0) return action.setNumber(number).build();
      return action.setToken(delivery.getToken()).build();
    }

    private Settlement.Builder extension() {
      // The next Extend follows at the next heartbeat, which may be no sooner than a short grace.
      long most = Math.max(grace, MISSED_BEATS * beat);
      long lease = Times.clamp(keptUntil - Times.now(), SHORTEST, most);
      return Settlement.newBuilder()
          .setExtend(ExtendAction.newBuilder().setLease(Times.duration(lease)));
    }
  }

  /** The messages of a frame, and when it was sent. */
  private record Sent(long at, List<Carried> parts) {}

  /** One call of Consume. The library reads always, and calls this. */
  private final class Stream implements ClientResponseObserver<ConsumeRequest, ConsumeResponse> {
    private final Set<Carried> mine = new LinkedHashSet<>();
    private final Set<Carried> ready = new LinkedHashSet<>(); // To be in the next frame.
    private final Map<Long, Sent> sent = new HashMap<>(); // Without a result, by frame.
    private ClientCallStreamObserver<ConsumeRequest> requests;
    private Future<?> beats;
    private long lastId;
    private int lastPlaces; // The credit that was sent last.
    private long lastFrame; // When the last frame of the proxy came.
    private int failed; // The number of frames in a row that must be repeated.
    private boolean started; // The first frame is written.
    private boolean closed; // Nothing more may be written.
    private boolean opened; // The proxy serves it.
    private long pause; // The id of the credit of 0. 0: it was not sent.
    private boolean paused; // No message comes any more.
    private boolean drains;
    private boolean ended;
    private FetchProxyException trouble; // Why it has ended. Null: an orderly end.

    void open() {
      lastFrame = Times.now();
      try {
        client.streaming().consume(this);
        beats = writer.scheduleAtFixedRate(this::beat, beat, beat, TimeUnit.MILLISECONDS);
      } catch (StatusRuntimeException unreadable) { // The files of credentials.
        onError(unreadable);
      } catch (RejectedExecutionException closed) {
        onError(Status.UNAVAILABLE.withDescription("the client is closed").asRuntimeException());
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
            synchronized (ConsumeLoop.this) {
              boolean hasNews =
                  !started || !ready.isEmpty() || isStopping() || lastPlaces != places();
              if (hasNews && isWritable()) write();
            }
          });
    }

    private void beat() {
      synchronized (ConsumeLoop.this) {
        if (closed) return;
        if (Times.now() - lastFrame > MISSED_BEATS * beat) {
          cancel("no frame for " + MISSED_BEATS * beat + " ms");
          return;
        }
        // The proxy keeps the leases of this stream, but not those that have outlived theirs.
        for (Carried message : List.copyOf(mine)) {
          if (message.keptUntil <= Times.now() && message.isUndecided()) {
            message.lose(FetchProxyException.lost("it was handled for " + options.atMost));
          } else if (message.number == 0 && message.isUndecided()) {
            message.send();
          }
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
      int places = places();
      if (!started) {
        var credit = ConsumeCredit.newBuilder().setMaxLeases(places);
        frame.setStart(start.toBuilder().setCredit(credit.setMaxBytes(options.maxBytes)));
      } else if (!isStopping() && places != lastPlaces) {
        frame.setCredit(ConsumeCredit.newBuilder().setId(++lastId).setMaxLeases(places));
      }
      started = true;
      lastPlaces = places;
      if (isStopping() && pause == 0) {
        pause = ++lastId;
        frame.setCredit(ConsumeCredit.newBuilder().setId(pause).setMaxLeases(0));
      }
      List<Carried> parts = ready.stream().limit(MOST_SETTLEMENTS).toList();
      if (!parts.isEmpty()) {
        var settle = ConsumeSettle.newBuilder().setId(++lastId);
        parts.forEach(message -> settle.addSettlements(message.settlement()));
        frame.setSettle(settle);
        sent.put(lastId, new Sent(Times.now(), parts));
        parts.forEach(ready::remove);
        if (!ready.isEmpty()) wake();
      }
      requests.onNext(frame.build());
      if (paused && mine.isEmpty()) {
        closed = true;
        requests.onCompleted();
      }
    }

    void cancel(String why) {
      if (closed || requests == null) return;
      closed = true;
      requests.cancel(why, null);
    }

    @Override
    public void onNext(ConsumeResponse frame) {
      synchronized (ConsumeLoop.this) {
        opened = true;
        lastFrame = Times.now();
        heard = lastFrame;
        for (Delivery delivery : frame.getMessagesList()) take(new Carried(delivery, this));
        for (var rejected : frame.getRejectedList()) {
          refuse(rejected, delivery -> new Carried(delivery, this));
        }
        frame.getResultsList().forEach(this::note);
        for (var end : frame.getEndedList()) {
          for (Carried message : List.copyOf(mine)) {
            if (message.number == end.getNumber()) {
              message.lose(FetchProxyException.of(end.getWhy()));
            }
          }
        }
        if (frame.hasDraining()) {
          drains = true;
          if (current == this) current = new Stream();
          ConsumeLoop.this.notifyAll();
        }
        if (pause != 0 && frame.getCreditId() >= pause) {
          paused = true;
          wake();
        }
      }
    }

    /** Records the results of one frame. */
    private void note(ConsumeResult result) {
      Sent frame = sent.remove(result.getId());
      List<Carried> parts = frame.parts;
      var again = new ArrayList<Carried>();
      FetchProxyException reason = null;
      for (int i = 0; i < parts.size(); i++) {
        Carried part = parts.get(i);
        SettleResult one =
            result.hasError()
                ? SettleResult.newBuilder().setError(result.getError()).build()
                : result.getResults(i);
        FetchProxyException trouble = Client.failure(one);
        if (trouble != null && trouble.isRepeatable()) {
          again.add(part);
          reason = trouble;
        } else if (trouble != null) {
          part.lose(trouble);
        } else if (one.getOutcome() == Outcome.OUTCOME_EXTENDED) {
          part.ends(frame.at + Times.millis(one.getLease()));
        } else {
          part.settle();
        }
      }
      if (reason == null) {
        failed = 0;
        return;
      }
      Runnable repeat =
          () -> {
            synchronized (ConsumeLoop.this) {
              again.forEach(Carried::send);
            }
          };
      writer.schedule(repeat, waitAfter(reason, failed++), TimeUnit.MILLISECONDS);
    }

    @Override
    public void onError(Throwable error) {
      end(FetchProxyException.of((StatusRuntimeException) error));
    }

    @Override
    public void onCompleted() {
      end(null);
    }

    /** Hands what is left to the next stream: it is settled there by token, or extended. */
    private void end(FetchProxyException why) {
      synchronized (ConsumeLoop.this) {
        trouble = why;
        closed = true;
        ended = true;
        if (beats != null) beats.cancel(false);
        if (current == this) current = new Stream();
        for (Carried message : List.copyOf(mine)) {
          if (message.number != 0) message.ends(lastFrame + grace);
          message.stream = current;
          message.number = 0;
          current.mine.add(message);
          message.send();
        }
        mine.clear();
        open.remove(this);
        ConsumeLoop.this.notifyAll();
      }
    }
  }
}
