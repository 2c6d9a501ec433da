package io.fetchproxy.client;

import java.time.Duration;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.ThreadFactory;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;

/**
 * Runs a handler for each message of a consumer. A return of the handler is an Ack, {@link Nak} and
 * {@link Term} are what they say, and any other failure is a Nak with a growing delay.
 *
 * <p>A worker runs once. It keeps the lease of each message while its handler runs.
 */
public final class Worker implements AutoCloseable {
  /** How messages come. */
  public enum Mode {
    /** On one stream: least cost for each message. */
    CONSUME,
    /** By a call for each batch. */
    FETCH
  }

  private final Options options;
  private final Events events;
  private final Loop loop;
  private final CountDownLatch ended = new CountDownLatch(1);
  private final ScheduledThreadPoolExecutor timer =
      new ScheduledThreadPoolExecutor(
          1, Threads.named("fetchproxy-timer"), new ThreadPoolExecutor.DiscardPolicy());
  private boolean began;

  private <T> Worker(Options options, Decoder<T> decoder, Handler<T> handler) {
    this.options = options;
    events = new Events(options.onEvent);
    var work = new Work<>(options, decoder, handler);
    loop =
        options.mode == Mode.CONSUME
            ? new ConsumeLoop(options, events, work)
            : new FetchLoop(options, events, work);
  }

  /**
   * Begins to make a worker, whose messages are JSON text.
   *
   * @param client the client, which stays open when the worker ends
   * @param stream the name of the stream
   * @param consumer the name of a pull consumer of the stream
   * @return a builder
   */
  public static Builder<String> builder(Client client, String stream, String consumer) {
    return new Builder<>(new Options(client, stream, consumer), Decoder.json());
  }

  /**
   * Works until {@link #stop} was called and every message is settled.
   *
   * @throws FetchProxyException if the proxy refuses what a person must look at
   * @throws InterruptedException if the thread is interrupted; the messages in hand are left to
   *     others
   */
  public void run() throws InterruptedException {
    synchronized (this) {
      if (began) throw new IllegalStateException("a worker runs once");
      began = true;
    }
    var hook = options.stopOnShutdown ? new Thread(this::stopAndWait, "fetchproxy-stop") : null;
    if (hook != null) Runtime.getRuntime().addShutdownHook(hook);
    events.tell(new Event.Ready());
    try {
      loop.run();
      events.tell(new Event.Stopped());
    } finally {
      loop.close();
      timer.shutdownNow();
      events.close();
      ended.countDown();
      forget(hook);
    }
  }

  /**
   * Takes no more messages, gives back those that wait, and lets the handlers end. A second stop,
   * or the end of the stop timeout, interrupts the handlers and gives their messages back. Returns
   * at once; any thread may call it.
   */
  public void stop() {
    loop.stop();
    if (options.stopTimeout != null) {
      timer.schedule(loop::endHandlers, options.stopTimeout.toMillis(), TimeUnit.MILLISECONDS);
    }
  }

  /** Stops the worker, and waits for the end of {@link #run}, if it was called. */
  @Override
  public void close() {
    boolean runs;
    synchronized (this) {
      runs = began;
      began = true;
    }
    if (runs) stopAndWait();
  }

  private void stopAndWait() {
    if (ended.getCount() > 0) stop();
    try {
      ended.await();
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    }
  }

  private static void forget(Thread hook) {
    try {
      if (hook != null) Runtime.getRuntime().removeShutdownHook(hook);
    } catch (IllegalStateException shutdown) {
      // It runs already.
    }
  }

  /**
   * The options of a worker. A wrong option is refused by {@link #build}.
   *
   * @param <T> the decoded payload
   */
  public static final class Builder<T> {
    private final Options options;
    private final Decoder<T> decoder;

    private Builder(Options options, Decoder<T> decoder) {
      this.options = options;
      this.decoder = decoder;
    }

    /**
     * Sets what makes the data of a message out of its payload. Without it, the data is JSON text.
     *
     * @param <U> the decoded payload
     * @param decoder the decoder
     * @return a builder with the same options
     */
    public <U> Builder<U> decode(Decoder<U> decoder) {
      return new Builder<>(options, decoder);
    }

    /**
     * Sets the most handlers at once.
     *
     * @param handlers 1 to 1000; 16 if it is not set
     * @return this builder
     */
    public Builder<T> concurrency(int handlers) {
      options.concurrency = handlers;
      return this;
    }

    /**
     * Sets how messages come.
     *
     * @param mode the mode; {@link Mode#CONSUME} if it is not set
     * @return this builder
     */
    public Builder<T> mode(Mode mode) {
      options.mode = mode;
      return this;
    }

    /**
     * Sets the most messages that wait or are handled. {@link Mode#FETCH} only.
     *
     * @param messages 1 to 1000; as many as handlers if it is not set
     * @return this builder
     */
    public Builder<T> batch(int messages) {
      options.batch = messages;
      return this;
    }

    /**
     * Sets the longest wait of a call for messages. {@link Mode#FETCH} only.
     *
     * @param wait 0 to 5 min; 10 s if it is not set
     * @return this builder
     */
    public Builder<T> maxWait(Duration wait) {
      options.maxWait = wait;
      return this;
    }

    /**
     * Sets the length of a lease, which is extended again and again. {@link Mode#FETCH} only.
     *
     * @param lease 1 s to the longest lease of the proxy; the ack wait of the consumer if it is not
     *     set
     * @return this builder
     */
    public Builder<T> lease(Duration lease) {
      options.lease = lease;
      return this;
    }

    /**
     * Sets the time after which the messages of a worker that dies come back. {@link Mode#CONSUME}
     * only.
     *
     * @param grace 1 s to 3 min; 10 s if it is not set
     * @return this builder
     */
    public Builder<T> grace(Duration grace) {
      options.grace = grace;
      return this;
    }

    /**
     * Sets the most bytes of messages in hand. The last answer or frame may pass it.
     *
     * @param bytes 1 KiB to 64 MiB; 16 MiB if it is not set
     * @return this builder
     */
    public Builder<T> maxBytes(long bytes) {
      options.maxBytes = bytes;
      return this;
    }

    /**
     * Sets the longest time that a lease is kept for one handler.
     *
     * @param time 1 s to the longest lease of the proxy; 1 h if it is not set
     * @return this builder
     */
    public Builder<T> atMost(Duration time) {
      options.atMost = time;
      return this;
    }

    /**
     * Sets how long handlers may continue after {@link Worker#stop}.
     *
     * @param time 0 or more; until they end if it is not set
     * @return this builder
     */
    public Builder<T> stopTimeout(Duration time) {
      options.stopTimeout = time;
      return this;
    }

    /**
     * Sets what gets each event, in order, in a thread of its own. It must return soon. Without it,
     * the worker logs warnings with {@link System.Logger}.
     *
     * @param listener the listener
     * @return this builder
     */
    public Builder<T> onEvent(Consumer<Event> listener) {
      options.onEvent = listener;
      return this;
    }

    /**
     * Sets the name of the worker in the logs of the proxy.
     *
     * @param name at most 1 KiB; "fetch-proxy java" if it is not set
     * @return this builder
     */
    public Builder<T> name(String name) {
      options.name = name;
      return this;
    }

    /**
     * Sets what makes a span around each handler.
     *
     * @param tracer the tracer
     * @return this builder
     */
    public Builder<T> tracer(HandlerTracer tracer) {
      options.tracer = tracer;
      return this;
    }

    /**
     * Sets what makes the threads of the handlers, for example virtual threads.
     *
     * @param factory the factory; daemon threads if it is not set
     * @return this builder
     */
    public Builder<T> threadFactory(ThreadFactory factory) {
      options.threadFactory = factory;
      return this;
    }

    /**
     * Stops the worker when the process is told to end, by SIGTERM or SIGINT, and lets the process
     * end after {@link Worker#run}. Java then exits with 143 or 130, as it does after these
     * signals.
     *
     * @return this builder
     */
    public Builder<T> stopOnShutdown() {
      options.stopOnShutdown = true;
      return this;
    }

    /**
     * Makes the worker, which begins with {@link Worker#run}.
     *
     * @param handler the work on one message
     * @return a worker
     * @throws IllegalArgumentException if an option is out of its range
     */
    public Worker build(Handler<T> handler) {
      return new Worker(options.checked(decoder.codec()), decoder, handler);
    }
  }
}
