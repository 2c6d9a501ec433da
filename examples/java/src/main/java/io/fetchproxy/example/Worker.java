package io.fetchproxy.example;

import com.google.gson.Gson;
import io.fetchproxy.client.Client;
import io.fetchproxy.client.Decoder;
import io.fetchproxy.client.Message;
import io.fetchproxy.client.Nak;
import io.fetchproxy.client.Term;
import java.time.Duration;

/** A worker for the samples of {@code fetch-proxy dev}. Put your own work into {@link #handle}. */
public final class Worker {
  static final Decoder<Task> TASKS = Decoder.json(text -> new Gson().fromJson(text, Task.class));

  record Task(int id, String kind) {}

  public static void main(String[] args) throws Exception {
    try (var client = Client.fromEnv()) {
      io.fetchproxy.client.Worker.builder(client, "TASKS", "batch-worker")
          .decode(TASKS)
          .stopOnShutdown()
          .build(Worker::handle)
          .run();
    }
  }

  /** The work. Its return is an Ack. Its thread is interrupted if the message is lost. */
  static void handle(Message<Task> message) throws InterruptedException {
    Task task = message.data();
    if (task.kind().equals("broken")) throw new Term("task " + task.id() + " can never be done");
    if (task.kind().equals("flaky") && message.deliveryCount() == 1) {
      throw new Nak(Duration.ofSeconds(1));
    }
    Thread.sleep(100);
    System.out.println("done: " + task.id());
  }
}
