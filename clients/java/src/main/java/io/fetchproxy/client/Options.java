package io.fetchproxy.client;

import io.fetchproxy.v1.Codec;
import java.time.Duration;
import java.util.concurrent.ThreadFactory;
import java.util.function.Consumer;

/** The options of a worker. */
final class Options {
  final Client client;
  final String stream;
  final String consumer;
  int concurrency = 16;
  Worker.Mode mode = Worker.Mode.CONSUME;
  int batch;
  Duration maxWait = Duration.ofSeconds(10);
  Duration lease;
  Duration grace = Duration.ofSeconds(10);
  long maxBytes = Connection.MAX_BYTES;
  Duration atMost = Duration.ofHours(1);
  Duration stopTimeout;
  Consumer<Event> onEvent;
  String name = "fetch-proxy java";
  HandlerTracer tracer;
  ThreadFactory threadFactory = Threads.named("fetchproxy-handler");
  boolean stopOnShutdown;
  Codec codec;

  Options(Client client, String stream, String consumer) {
    this.client = client;
    this.stream = stream;
    this.consumer = consumer;
  }

  /** The options as they are now, checked. */
  Options checked(Codec codec) {
    var copy = new Options(client, stream, consumer);
    copy.concurrency = in("concurrency", concurrency, 1, 1_000);
    copy.mode = mode;
    copy.batch = in("batch", batch == 0 ? concurrency : batch, 1, 1_000);
    copy.maxWait = in("maxWait", maxWait, Duration.ZERO, Duration.ofMinutes(5));
    copy.lease = in("lease", lease, Duration.ofSeconds(1), null);
    copy.grace = in("grace", grace, Duration.ofSeconds(1), Duration.ofMinutes(3));
    copy.maxBytes = in("maxBytes", maxBytes, 1 << 10, 64 << 20);
    copy.atMost = in("atMost", atMost, Duration.ofSeconds(1), null);
    copy.stopTimeout = in("stopTimeout", stopTimeout, Duration.ZERO, null);
    copy.onEvent = onEvent;
    copy.name = name;
    copy.tracer = tracer;
    copy.threadFactory = threadFactory;
    copy.stopOnShutdown = stopOnShutdown;
    copy.codec = codec;
    return copy;
  }

  private static int in(String option, long value, long least, long most) {
    if (value >= least && value <= most) return (int) value;
    throw new IllegalArgumentException(
        option + " is " + value + ", but must be " + least + " to " + most);
  }

  private static Duration in(String option, Duration value, Duration least, Duration most) {
    boolean tooLong = value != null && most != null && value.compareTo(most) > 0;
    if (value == null || (value.compareTo(least) >= 0 && !tooLong)) return value;
    String range = most == null ? "at least " + least : least + " to " + most;
    throw new IllegalArgumentException(option + " is " + value + ", but must be " + range);
  }
}
