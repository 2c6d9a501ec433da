package io.fetchproxy.example;

import com.google.gson.Gson;
import com.google.gson.JsonParseException;
import com.google.gson.annotations.SerializedName;
import io.fetchproxy.example.FetchProxy.Batch;
import io.fetchproxy.example.FetchProxy.Lease;
import io.fetchproxy.example.FetchProxy.Poison;
import io.fetchproxy.example.FetchProxy.Transient;
import io.fetchproxy.v1.Codec;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.FetchRequest;
import java.io.IOException;
import java.util.Map;
import java.util.concurrent.CompletableFuture;

/**
 * The worker loop: fetch a batch, handle its messages one after the other, fetch the next.
 *
 * <p>Put your own work into {@link #handle}, at the end. It need not know about leases. To work on
 * more messages at a time, start more workers.
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
      work(proxy);
      code = 0;
    } catch (Exception error) {
      System.err.println("worker: " + error.getMessage());
    } finally {
      exitCode.complete(code);
    }
    System.exit(code);
  }

  /** Runs until the proxy is stopped, or a Fetch is permanently refused. */
  private static void work(FetchProxy proxy) throws Exception {
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
    FetchProxy.say("ready", Map.of());
    while (!proxy.isStopped()) {
      Batch batch = proxy.fetch(request);
      for (Lease lease : batch.leases) {
        if (lease.begin()) workOn(lease);
      }
      batch.await();
    }
    FetchProxy.say("stopped", Map.of());
  }

  /** Decides the outcome of the message by the result of the work. */
  private static void workOn(Lease lease) {
    try {
      handle(lease.message);
      lease.ack();
    } catch (Transient failure) {
      lease.nak(failure.delay);
    } catch (Poison failure) {
      lease.term(failure.getMessage());
    } catch (Throwable failure) {
      System.err.print("message " + lease.message.getStreamSequence() + ": ");
      failure.printStackTrace();
      lease.nak(5_000);
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
