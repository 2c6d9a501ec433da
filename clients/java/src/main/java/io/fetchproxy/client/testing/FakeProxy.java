package io.fetchproxy.client.testing;

import com.google.protobuf.ByteString;
import io.fetchproxy.client.Client;
import io.fetchproxy.client.Worker;
import io.grpc.Server;
import io.grpc.inprocess.InProcessChannelBuilder;
import io.grpc.inprocess.InProcessServerBuilder;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.RejectedExecutionHandler;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.SynchronousQueue;
import java.util.concurrent.ThreadFactory;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/**
 * A proxy in the memory of a test, with one stream and one consumer, whatever names a worker gives
 * them. It speaks the contract, so the real client and the real worker run with it.
 *
 * <p>It does not wait for the delay of a Nak: the message comes back at once. A message ends with
 * an Ack, a Term, or the end of its last attempt.
 */
public final class FakeProxy implements AutoCloseable {
  private static final Duration LONGEST_RUN = Duration.ofSeconds(30);

  private static final ThreadFactory DAEMONS =
      work -> {
        var thread = new Thread(work, "fetchproxy-fake");
        thread.setDaemon(true);
        return thread;
      };

  /** After the end of the fake, a call may still end: nobody waits for its work. */
  private static final RejectedExecutionHandler DROP = new ThreadPoolExecutor.DiscardPolicy();

  private final ScheduledExecutorService timer = new ScheduledThreadPoolExecutor(1, DAEMONS, DROP);
  private final ExecutorService threads =
      new ThreadPoolExecutor(
          0, Integer.MAX_VALUE, 1, TimeUnit.MINUTES, new SynchronousQueue<>(), DAEMONS, DROP);
  private final FakeQueue queue = new FakeQueue(timer);
  private final FakeService service = new FakeService(queue, timer);
  private final Server server;
  private final Client client;

  /** Starts a fake. */
  public FakeProxy() {
    String name = InProcessServerBuilder.generateName();
    try {
      server =
          InProcessServerBuilder.forName(name)
              .executor(threads)
              .addService(service)
              .build()
              .start();
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
    client = Client.of(InProcessChannelBuilder.forName(name).build());
  }

  /**
   * Sets the number of attempts after which a message ends.
   *
   * @param attempts 0 for no limit, as it is if it is not set
   * @return this fake
   */
  public FakeProxy maxDeliver(int attempts) {
    synchronized (queue) {
      queue.maxDeliver = attempts;
    }
    return this;
  }

  /**
   * Sets the length of a lease of a Fetch that names none.
   *
   * @param time 30 s if it is not set
   * @return this fake
   */
  public FakeProxy ackWait(Duration time) {
    synchronized (queue) {
      queue.ackWait = time.toMillis();
    }
    return this;
  }

  /**
   * Returns a client of the fake.
   *
   * @return the same client each time, which ends with the fake
   */
  public Client client() {
    return client;
  }

  /**
   * Adds a message, with the subject {@code test} and without headers.
   *
   * @param payload the payload, as text
   * @return the record of the message
   */
  public FakeMessage publish(String payload) {
    return publish(payload.getBytes(StandardCharsets.UTF_8), "test", Map.of());
  }

  /**
   * Adds a message.
   *
   * @param payload the payload
   * @param subject the subject
   * @param headers each name with all its values, in order
   * @return the record of the message
   */
  public FakeMessage publish(byte[] payload, String subject, Map<String, List<String>> headers) {
    return queue.publish(ByteString.copyFrom(payload), subject, new TreeMap<>(headers));
  }

  /**
   * Returns all messages.
   *
   * @return their records, in the order of the stream
   */
  public List<FakeMessage> messages() {
    synchronized (queue) {
      return List.copyOf(queue.messages);
    }
  }

  /**
   * Runs the worker until each message has ended, for at most 30 s, and stops it.
   *
   * @param worker a worker with the client of this fake
   * @throws InterruptedException if the thread is interrupted
   * @throws IllegalStateException if a message has not ended in time
   */
  public void run(Worker worker) throws InterruptedException {
    run(worker, LONGEST_RUN);
  }

  /**
   * Runs the worker until each message has ended, and stops it.
   *
   * @param worker a worker with the client of this fake
   * @param longest the longest time to wait for that
   * @throws InterruptedException if the thread is interrupted
   * @throws IllegalStateException if a message has not ended in time
   */
  public void run(Worker worker, Duration longest) throws InterruptedException {
    var watching = threads.submit(() -> stopAtEnd(worker, longest));
    try {
      worker.run();
    } finally {
      watching.cancel(true);
    }
    synchronized (queue) {
      var left = queue.messages.stream().filter(message -> !message.ended);
      List<Long> sequences = left.map(FakeMessage::sequence).toList();
      if (sequences.isEmpty()) return;
      throw new IllegalStateException("messages " + sequences + " have not ended in " + longest);
    }
  }

  private Void stopAtEnd(Worker worker, Duration longest) throws InterruptedException {
    long until = FakeQueue.now() + longest.toMillis();
    boolean ended = false;
    synchronized (queue) {
      while (!ended && FakeQueue.now() < until) {
        ended = queue.messages.stream().allMatch(message -> message.ended);
        if (!ended) queue.wait(Math.max(until - FakeQueue.now(), 1));
      }
    }
    worker.stop();
    if (!ended) worker.stop();
    return null;
  }

  /**
   * Ends the lease of a message, as if another worker had it. The message comes back.
   *
   * @param message a message that a worker has
   */
  public void expire(FakeMessage message) {
    queue.expire(message);
  }

  /**
   * Lets the next call of a method fail.
   *
   * @param method the name of the method in the contract, for example {@code Fetch}
   * @param reason a reason of the page "Errors"
   */
  public void fail(String method, String reason) {
    service.fail(method, reason);
  }

  /**
   * Lets the next settlement fail, in whatever call it comes. The message stays leased.
   *
   * @param reason a reason of the page "Errors"
   */
  public void failSettlement(String reason) {
    queue.fail(reason);
  }

  /** Ends the fake and its client. */
  @Override
  public void close() {
    client.close();
    server.shutdownNow();
    timer.shutdownNow();
    threads.shutdownNow();
  }
}
