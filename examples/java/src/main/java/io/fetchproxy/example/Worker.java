package io.fetchproxy.example;

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonParseException;
import com.google.gson.annotations.SerializedName;
import io.fetchproxy.example.FetchProxy.Batch;
import io.fetchproxy.example.FetchProxy.Lease;
import io.fetchproxy.example.FetchProxy.Outcome;
import io.fetchproxy.example.FetchProxy.Poison;
import io.fetchproxy.example.FetchProxy.Transient;
import io.fetchproxy.v1.Codec;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.FetchRequest;
import io.fetchproxy.v1.FetchResponse;
import io.fetchproxy.v1.Rejected;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.CompletableFuture;

/**
 * The worker loop: fetch a batch, handle its messages one after the other, settle each.
 *
 * <p>Put your own work into {@link #handle}, at the end; it need know nothing of leases. To work on
 * more messages at a time, start more workers.
 */
public final class Worker {
  /** How many milliseconds an outcome may wait for others, to be settled with them. */
  private static final long GATHER = 100;

  private static final Gson GSON = new GsonBuilder().serializeNulls().create();

  public static void main(String[] args) {
    String address = env("FETCH_PROXY_ADDR", "127.0.0.1:50051").split(",")[0];
    var proxy = new FetchProxy(address, Worker::retry);
    var exitCode = new CompletableFuture<Integer>();
    // SIGTERM runs this beside the loop, whose end it waits for.
    Runnable shutdown =
        () -> {
          proxy.stop();
          Runtime.getRuntime().halt(exitCode.join());
        };
    Runtime.getRuntime().addShutdownHook(new Thread(shutdown));
    int code = 1;
    try (proxy) {
      work(proxy);
      code = 0;
    } catch (Exception error) {
      System.err.println("worker: " + error.getMessage());
    } finally {
      exitCode.complete(code);
    }
    System.exit(code);
  }

  /** Goes on until the proxy is stopped, or a Fetch refused for good. */
  private static void work(FetchProxy proxy) throws InterruptedException {
    FetchRequest request =
        FetchRequest.newBuilder()
            .setStream(env("STREAM", null))
            .setConsumer(env("CONSUMER", null))
            .setN(Integer.parseInt(env("BATCH", "10")))
            .setMaxWait(FetchProxy.duration(millis(Double.parseDouble(env("MAX_WAIT", "10")))))
            .setMaxBytes(FetchProxy.MAX_BYTES)
            .setCodec(Codec.CODEC_JSON)
            .setWorker("examples/java")
            .build();
    say("ready", Map.of());
    while (!proxy.isStopped()) {
      FetchResponse answer = proxy.fetch(request);
      for (Rejected rejected : answer.getRejectedList()) {
        report(rejected);
        proxy.refuse(rejected);
      }
      try (Batch batch = proxy.hold(answer.getMessagesList())) {
        workThrough(batch, proxy);
      }
    }
    say("stopped", Map.of());
  }

  /** Handles and settles the messages of a batch. Once told to stop, it begins no other. */
  private static void workThrough(Batch batch, FetchProxy proxy) throws InterruptedException {
    for (Lease lease : batch.leases) {
      if (proxy.isStopped()) {
        lease.giveBack();
      } else if (!lease.isLost()) {
        workOn(lease);
      }
      if (batch.waited() > GATHER) {
        report(batch.settle());
      }
    }
    report(batch.settle());
  }

  /** Works on a message, and decides by how that ended what is to become of it. */
  private static void workOn(Lease lease) {
    try {
      handle(lease.message);
      lease.ack();
    } catch (Transient failure) {
      lease.nak(failure.delay);
    } catch (Poison failure) {
      lease.term(failure.getMessage());
    } catch (Exception failure) {
      System.err.println("message " + lease.message.getStreamSequence() + ": " + failure);
      lease.nak(5);
    }
  }

  /** The work itself: a task says what is to be done with it. */
  private static void handle(Delivery message) throws Exception {
    Task task = Task.in(message);
    switch (task.what()) {
      case "ok", "headers" -> {}
      case "fail" -> {
        if (message.getDeliveryCount() <= task.times()) throw new Transient(task.delay());
      }
      case "slow" -> Thread.sleep(millis(task.seconds()));
      case "poison" -> throw new Poison("the task says so");
      default -> throw new Poison("not a task");
    }
  }

  private record Task(
      JsonElement id, @SerializedName("do") String what, int times, double delay, double seconds) {

    private static final Task NONE = new Task(JsonNull.INSTANCE, "", 0, 0, 0);

    static Task in(Delivery message) {
      try {
        Task task = GSON.fromJson(message.getText(), Task.class);
        return task == null || task.what == null ? NONE : task;
      } catch (JsonParseException notAnObject) {
        return NONE;
      }
    }
  }

  /** Tells how the settling of messages ended. */
  private static void report(List<Lease> settled) {
    for (Lease lease : settled) {
      Delivery message = lease.message;
      Task task = Task.in(message);
      var line = about(message.getStreamSequence(), message.getDeliveryCount(), task.id());
      if (task.what().equals("headers") && lease.outcome() == Outcome.ACKED) {
        var headers = new TreeMap<String, List<String>>();
        message.getHeadersMap().forEach((name, of) -> headers.put(name, of.getValuesList()));
        line.put("headers", headers);
      }
      say(lease.outcome().name().toLowerCase(Locale.ROOT), line);
    }
  }

  private static void report(Rejected rejected) {
    long sequence = rejected.getStreamSequence();
    System.err.println("message " + sequence + " rejected: " + rejected.getDetail());
    say("rejected", about(sequence, rejected.getDeliveryCount(), JsonNull.INSTANCE));
  }

  private static Map<String, Object> about(long sequence, int deliveries, JsonElement id) {
    var line = new LinkedHashMap<String, Object>();
    line.put("sequence", sequence);
    line.put("deliveries", deliveries);
    line.put("id", id);
    return line;
  }

  private static void retry(String reason, double wait) {
    say("retry", Map.of("reason", reason, "in", wait));
  }

  /** Standard output has one JSON object a line. */
  private static void say(String event, Map<String, Object> more) {
    var line = new LinkedHashMap<String, Object>();
    line.put("event", event);
    line.putAll(more);
    System.out.println(GSON.toJson(line));
    System.out.flush();
  }

  private static String env(String name, String otherwise) {
    String value = System.getenv().getOrDefault(name, otherwise);
    if (value == null) throw new IllegalArgumentException(name + " must be set");
    return value;
  }

  private static long millis(double seconds) {
    return Math.round(seconds * 1e3);
  }
}
