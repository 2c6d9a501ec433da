package io.fetchproxy.example;

import com.google.gson.Gson;
import com.google.gson.JsonParseException;
import com.google.gson.annotations.SerializedName;
import io.fetchproxy.example.FetchProxy.Batch;
import io.fetchproxy.example.FetchProxy.Lease;
import io.fetchproxy.example.FetchProxy.Outcome;
import io.fetchproxy.example.FetchProxy.Poison;
import io.fetchproxy.example.FetchProxy.Transient;
import io.fetchproxy.v1.Codec;
import io.fetchproxy.v1.ConsumeCredit;
import io.fetchproxy.v1.ConsumeStart;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.FetchRequest;
import java.io.IOException;
import java.util.Map;
import java.util.concurrent.CompletableFuture;

/**
 * The two loops of a worker. With Fetch: fetch a batch, handle its messages one after the other,
 * fetch the next. With Consume, if CONCURRENCY is set: handle up to so many messages at once, as
 * they come.
 *
 * <p>Put your own work into {@link #handle}, at the end. It need not know about leases.
 */
public final class Worker {
  public static void main(String[] args) throws IOException {
    var proxy = new FetchProxy(env("FETCH_PROXY_ADDR", "127.0.0.1:50051"));
    var exitCode = new CompletableFuture<Integer>();
    // SIGTERM runs this next to the loop, and waits for the end of the loop.
    Runnable shutdown =
        () -> {
          proxy.stop();
          Runtime.getRuntime().halt(exitCode.join());
        };
    Runtime.getRuntime().addShutdownHook(new Thread(shutdown));
    int code = 1;
    try {
      FetchProxy.say("ready", Map.of());
      int concurrency = Integer.parseInt(env("CONCURRENCY", "0"));
      if (concurrency > 0) consume(proxy, concurrency);
      else fetch(proxy);
      FetchProxy.say("stopped", Map.of());
      code = 0;
    } catch (Exception error) {
      System.err.println("worker: " + error.getMessage());
    } finally {
      exitCode.complete(code);
    }
    System.exit(code);
  }

  /** Runs until the proxy is stopped, or the stream is permanently refused. */
  private static void consume(FetchProxy proxy, int concurrency) throws Exception {
    var start =
        ConsumeStart.newBuilder()
            .setStream(env("STREAM", ""))
            .setConsumer(env("CONSUMER", ""))
            .setCredit(ConsumeCredit.newBuilder().setMaxLeases(concurrency))
            .setMaxFrameBytes(FetchProxy.MAX_BYTES)
            .setCodec(Codec.CODEC_JSON)
            .setWorker("examples/java");
    long grace = millis(Double.parseDouble(env("GRACE", "10")));
    new Consume(proxy, start, grace, Worker::workOn).run();
  }

  /** Runs until the proxy is stopped, or a Fetch is permanently refused. */
  private static void fetch(FetchProxy proxy) throws Exception {
    FetchRequest request =
        FetchRequest.newBuilder()
            .setStream(env("STREAM", ""))
            .setConsumer(env("CONSUMER", ""))
            .setN(Integer.parseInt(env("BATCH", "10")))
            .setMaxWait(FetchProxy.duration(millis(Double.parseDouble(env("MAX_WAIT", "10")))))
            .setMaxBytes(FetchProxy.MAX_BYTES)
            .setCodec(Codec.CODEC_JSON)
            .setWorker("examples/java")
            .build();
    while (!proxy.isStopped()) {
      Batch batch = proxy.fetch(request);
      for (Lease lease : batch.leases) {
        if (lease.begin()) lease.decide(workOn(lease.message));
      }
      batch.await();
    }
  }

  /** Returns the outcome of the message, by the result of the work. */
  private static Outcome workOn(Delivery message) {
    try {
      handle(message);
      return Outcome.ack();
    } catch (Transient failure) {
      return Outcome.nak(failure.delay);
    } catch (Poison failure) {
      return Outcome.term(failure.getMessage());
    } catch (Throwable failure) {
      System.err.print("message " + message.getStreamSequence() + ": ");
      failure.printStackTrace();
      return Outcome.nak(5_000);
    }
  }

  /** The work itself: the task says what to do. */
  private static void handle(Delivery message) throws Exception {
    // A tombstone or a consumer of headers only: nothing to do.
    if (message.getText().isEmpty()) return;
    Task task = Task.in(message.getText());
    switch (task.what()) {
      case "ok", "headers" -> {}
      case "fail" -> {
        if (message.getDeliveryCount() <= task.times()) throw new Transient(millis(task.delay()));
      }
      case "slow" -> Thread.sleep(millis(task.seconds()));
      case "poison" -> throw new Poison("the task says so");
      default -> throw new Poison("unknown task " + task.what());
    }
  }

  private record Task(@SerializedName("do") String what, int times, double delay, double seconds) {
    static Task in(String text) throws Poison {
      try {
        Task task = new Gson().fromJson(text, Task.class);
        if (task != null && task.what != null) return task;
      } catch (JsonParseException error) {
        throw new Poison("not a task: " + error.getMessage());
      }
      throw new Poison("not a task");
    }
  }

  private static String env(String name, String otherwise) {
    return System.getenv().getOrDefault(name, otherwise);
  }

  private static long millis(double seconds) {
    return Math.round(seconds * 1e3);
  }
}
