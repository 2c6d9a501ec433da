package io.fetchproxy.example;

import static org.junit.jupiter.api.Assertions.assertEquals;

import io.fetchproxy.client.testing.FakeProxy;
import io.fetchproxy.client.testing.Settlement;
import java.time.Duration;
import java.util.List;
import org.junit.jupiter.api.Test;

/** A unit test of the handler, with a proxy in memory. */
final class WorkerTest {
  @Test
  void eachKindOfTaskIsSettled() throws Exception {
    try (var fake = new FakeProxy()) {
      var ok = fake.publish("{\"id\": 1, \"kind\": \"ok\"}");
      var flaky = fake.publish("{\"id\": 2, \"kind\": \"flaky\"}");
      var broken = fake.publish("{\"id\": 3, \"kind\": \"broken\"}");
      fake.run(
          io.fetchproxy.client.Worker.builder(fake.client(), "TASKS", "batch-worker")
              .decode(Worker.TASKS)
              .build(Worker::handle));
      var ack = new Settlement.Ack();
      assertEquals(List.of(ack), ok.settlements());
      assertEquals(List.of(new Settlement.Nak(Duration.ofSeconds(1)), ack), flaky.settlements());
      var term = new Settlement.Term("task 3 can never be done");
      assertEquals(List.of(term), broken.settlements());
    }
  }
}
