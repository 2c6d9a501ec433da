package io.fetchproxy.conformance;

import com.google.gson.Gson;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import com.google.gson.annotations.SerializedName;
import io.fetchproxy.client.Client;
import io.fetchproxy.client.Decoder;
import io.fetchproxy.client.Event;
import io.fetchproxy.client.Message;
import io.fetchproxy.client.Nak;
import io.fetchproxy.client.Term;
import io.fetchproxy.client.Worker.Mode;
import io.fetchproxy.v1.Rejected;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.CompletableFuture;

/**
 * The worker of the conformance suite: it does what each task says, and prints a line of JSON for
 * each event. CONCURRENCY chooses Consume.
 */
public final class Worker {
  private static final Gson GSON = new Gson();

  private Worker() {}

  /** Works until SIGTERM, or until the proxy refuses the worker. */
  public static void main(String[] args) {
    var exitCode = new CompletableFuture<Integer>();
    int code = 1;
    try (var client = Client.fromEnv()) {
      var worker = worker(client);
      // SIGTERM runs this next to the worker. The exit code of a stop is 0 here.
      Runnable shutdown =
          () -> {
            worker.stop();
            Runtime.getRuntime().halt(exitCode.join());
          };
      Runtime.getRuntime().addShutdownHook(new Thread(shutdown));
      worker.run();
      code = 0;
    } catch (Exception error) {
      System.err.println("worker: " + error.getMessage());
    } finally {
      exitCode.complete(code);
    }
    System.exit(code);
  }

  private static io.fetchproxy.client.Worker worker(Client client) {
    int concurrency = Integer.parseInt(env("CONCURRENCY", "0"));
    return io.fetchproxy.client.Worker.builder(client, env("STREAM", ""), env("CONSUMER", ""))
        .decode(Decoder.json(Task::in))
        .mode(concurrency > 0 ? Mode.CONSUME : Mode.FETCH)
        .concurrency(Math.max(concurrency, 1))
        .grace(seconds(env("GRACE", "10")))
        .batch(Integer.parseInt(env("BATCH", "10")))
        .maxWait(seconds(env("MAX_WAIT", "10")))
        .name("clients/java")
        .onEvent(Worker::tell)
        .build(Worker::handle);
  }

  private static void handle(Message<Task> message) throws Exception {
    Task task = message.data();
    // A tombstone or a consumer of headers only: nothing to do.
    if (task == null) return;
    switch (task.what()) {
      case "ok", "headers" -> {}
      case "fail" -> {
        if (message.deliveryCount() <= task.times()) throw new Nak(seconds(task.delay()));
      }
      case "slow" -> Thread.sleep(seconds(task.seconds()).toMillis());
      case "poison" -> throw new Term("the task says so");
      default -> throw new Term("unknown task " + task.what());
    }
  }

  private record Task(@SerializedName("do") String what, int times, double delay, double seconds) {
    static Task in(String text) {
      Task task = GSON.fromJson(text, Task.class);
      if (task == null || task.what == null) throw new IllegalArgumentException("not a task");
      return task;
    }
  }

  private static void tell(Event event) {
    if (event instanceof Event.Acked one) say(event, one.message());
    else if (event instanceof Event.Nacked one) say(event, one.message());
    else if (event instanceof Event.Termed one) say(event, one.message());
    else if (event instanceof Event.Returned one) say(event, one.message());
    else if (event instanceof Event.Rejected one) say(event, one.rejected());
    else if (event instanceof Event.Lost one) {
      log(one.message(), "lost: " + one.reason() + ": " + one.detail());
      say(event, one.message());
    } else if (event instanceof Event.HandlerError one) {
      log(one.message(), "failed: " + one.error());
    } else if (event instanceof Event.Retry one) {
      double wait = one.waitTime().toMillis() / 1e3;
      say(event, Map.of("reason", one.reason(), "message", one.detail(), "in", wait));
    } else say(event, Map.of());
  }

  private static void say(Event event, Message<?> message) {
    var line = new LinkedHashMap<String, Object>();
    line.put("sequence", message.streamSequence());
    line.put("deliveries", message.deliveryCount());
    line.put("id", idOf(message.payload()));
    if (!message.headers().isEmpty()) line.put("headers", message.headers());
    say(event, line);
  }

  private static void say(Event event, Rejected rejected) {
    var line = new LinkedHashMap<String, Object>();
    line.put("sequence", rejected.getStreamSequence());
    line.put("deliveries", rejected.getDeliveryCount());
    var headers = new TreeMap<String, List<String>>();
    rejected.getHeadersMap().forEach((name, values) -> headers.put(name, values.getValuesList()));
    if (!headers.isEmpty()) line.put("headers", headers);
    say(event, line);
    System.err.println("message " + rejected.getStreamSequence() + " " + rejected.getDetail());
  }

  private static JsonElement idOf(byte[] payload) {
    try {
      var text = new String(payload, StandardCharsets.UTF_8);
      if (JsonParser.parseString(text) instanceof JsonObject task) return task.get("id");
    } catch (JsonParseException | StackOverflowError noTask) {
      // The payload has no id.
    }
    return null;
  }

  private static void say(Event event, Map<String, Object> more) {
    var line = new LinkedHashMap<String, Object>();
    line.put("event", event.name());
    line.putAll(more);
    System.out.println(GSON.toJson(line));
    System.out.flush();
  }

  private static void log(Message<?> message, String what) {
    System.err.println("message " + message.streamSequence() + " " + what);
  }

  private static String env(String name, String otherwise) {
    return System.getenv().getOrDefault(name, otherwise);
  }

  private static Duration seconds(String seconds) {
    return seconds(Double.parseDouble(seconds));
  }

  private static Duration seconds(double seconds) {
    return Duration.ofMillis(Math.round(seconds * 1e3));
  }
}
