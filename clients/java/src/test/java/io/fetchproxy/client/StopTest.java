package io.fetchproxy.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.fetchproxy.client.Worker.Mode;
import io.fetchproxy.client.testing.FakeProxy;
import io.fetchproxy.client.testing.Settlement;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/** The end of a worker while handlers run. */
@Timeout(60)
final class StopTest {
  private static final Settlement ACK = new Settlement.Ack();
  private static final Settlement RETURNED = new Settlement.Nak(Duration.ZERO);

  private final FakeProxy fake = new FakeProxy();
  private final List<Event> events = new CopyOnWriteArrayList<>();
  private final CountDownLatch begun = new CountDownLatch(1);
  private final CountDownLatch release = new CountDownLatch(1);

  @AfterEach
  void close() {
    fake.close();
  }

  private Worker.Builder<String> worker(Mode mode) {
    return Worker.builder(fake.client(), "TASKS", "worker")
        .mode(mode)
        .concurrency(1)
        .batch(5)
        .onEvent(events::add);
  }

  private void hold(Message<String> message) throws InterruptedException {
    begun.countDown();
    release.await();
  }

  private Future<Void> start(Worker worker) throws InterruptedException {
    var thread = Executors.newSingleThreadExecutor();
    Future<Void> running =
        thread.submit(
            () -> {
              worker.run();
              return null;
            });
    thread.shutdown();
    begun.await();
    return running;
  }

  private long count(String name) {
    return events.stream().filter(event -> event.name().equals(name)).count();
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void handlerThatRunsComesToItsEnd(Mode mode) throws Exception {
    var message = fake.publish("{}");
    var worker = worker(mode).build(this::hold);
    var running = start(worker);
    worker.stop();
    var late = fake.publish("{}");
    release.countDown();
    running.get();
    assertEquals(List.of(ACK), message.settlements());
    assertEquals(0, late.attempts());
    assertEquals("stopped", events.get(events.size() - 1).name());
  }

  @Test
  void messagesThatWaitGoBackAtOnce() throws Exception {
    var messages = IntStream.range(0, 5).mapToObj(i -> fake.publish("{}")).toList();
    var worker = worker(Mode.FETCH).build(this::hold);
    var running = start(worker);
    worker.stop();
    while (count("returned") < 4) Thread.sleep(5);
    assertEquals(List.of(), messages.get(0).settlements());
    release.countDown();
    running.get();
    assertEquals(List.of(ACK), messages.get(0).settlements());
    for (var each : messages.subList(1, 5)) assertEquals(List.of(RETURNED), each.settlements());
  }

  @Test
  void messageThatWaitsOnItsLastAttemptIsHandled() throws Exception {
    var messages = IntStream.range(0, 3).mapToObj(i -> fake.publish("{}")).toList();
    fake.maxDeliver(1);
    var worker = worker(Mode.FETCH).build(this::hold);
    var running = start(worker);
    worker.stop();
    release.countDown();
    running.get();
    for (var each : messages) assertEquals(List.of(ACK), each.settlements());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void secondStopInterruptsHandlersAndGivesTheirMessagesBack(Mode mode) throws Exception {
    var message = fake.publish("{}");
    // With one handler, no Fetch waits that could take the message again.
    var worker = worker(mode).concurrency(1).build(this::hold);
    var running = start(worker);
    worker.stop();
    worker.stop();
    running.get();
    assertEquals(List.of(RETURNED), message.settlements());
    assertEquals(1, count("returned"));
    assertEquals(0, count("handler_error"));
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void endOfTheStopTimeoutInterruptsHandlers(Mode mode) throws Exception {
    var message = fake.publish("{}");
    var worker = worker(mode).concurrency(1).stopTimeout(Duration.ofMillis(50)).build(this::hold);
    var running = start(worker);
    worker.stop();
    running.get();
    assertEquals(List.of(RETURNED), message.settlements());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void lastAttemptThatIsInterruptedIsLeftToTheEndOfItsLease(Mode mode) throws Exception {
    var message = fake.maxDeliver(1).publish("{}");
    var worker = worker(mode).build(this::hold);
    var running = start(worker);
    worker.stop();
    worker.stop();
    running.get();
    assertEquals(List.of(), message.settlements());
    assertEquals(1, count("lost"));
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void stopBeforeTheRunEndsItAtOnce(Mode mode) throws Exception {
    var message = fake.publish("{}");
    var worker = worker(mode).build(one -> {});
    worker.stop();
    worker.run();
    assertTrue(message.attempts() <= 1, "it may have come before the pause");
    assertThrows(IllegalStateException.class, worker::run);
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void closeStopsAndWaits(Mode mode) throws Exception {
    var message = fake.publish("{}");
    var worker = worker(mode).build(this::hold);
    var running = start(worker);
    release.countDown();
    worker.close();
    running.get();
    assertEquals(List.of(ACK), message.settlements());
  }

  /** The process of the next test. */
  static final class Process {
    private Process() {}

    public static void main(String[] args) throws Exception {
      try (var fake = new FakeProxy()) {
        fake.publish("{}");
        Worker.builder(fake.client(), "TASKS", "worker")
            .stopOnShutdown()
            .onEvent(event -> System.out.println(event.name()))
            .build(
                message -> {
                  System.out.println("begun");
                  Thread.sleep(1_000);
                })
            .run();
      }
    }
  }

  @Test
  void sigtermLetsTheHandlerEnd() throws Exception {
    var java = Path.of(System.getProperty("java.home"), "bin", "java").toString();
    var classes = System.getProperty("java.class.path");
    var process =
        new ProcessBuilder(java, "-Xmx64m", "-cp", classes, Process.class.getName())
            .redirectErrorStream(true)
            .start();
    try (var output = process.inputReader()) {
      assertEquals("ready", output.readLine());
      assertEquals("begun", output.readLine());
      process.toHandle().destroy();
      assertEquals(List.of("acked", "stopped"), output.lines().toList());
    }
    assertEquals(143, process.waitFor());
  }
}
