package io.fetchproxy.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.fetchproxy.client.Worker.Mode;
import io.fetchproxy.client.testing.FakeProxy;
import io.fetchproxy.client.testing.Settlement;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/** Outcomes, cancelling and failures, with the fake. */
@Timeout(60)
final class WorkerTest {
  private static final Settlement ACK = new Settlement.Ack();

  private final FakeProxy fake = new FakeProxy();
  private final List<Event> events = new CopyOnWriteArrayList<>();

  @AfterEach
  void close() {
    fake.close();
  }

  private Worker.Builder<String> worker(Mode mode) {
    return Worker.builder(fake.client(), "TASKS", "worker")
        .mode(mode)
        .maxWait(Duration.ofSeconds(1))
        .grace(Duration.ofSeconds(1))
        .onEvent(events::add);
  }

  private List<String> names() {
    return events.stream().map(Event::name).toList();
  }

  private static void awaitQuietly(CountDownLatch latch) {
    try {
      latch.await();
    } catch (InterruptedException ended) {
      throw new IllegalStateException(ended);
    }
  }

  private static Settlement nak(long seconds) {
    return new Settlement.Nak(Duration.ofSeconds(seconds));
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void eachMessageIsHandledAndAckedOnce(Mode mode) throws Exception {
    var texts = new CopyOnWriteArrayList<String>();
    var published = IntStream.range(0, 100).mapToObj(i -> fake.publish("" + i)).toList();
    fake.run(worker(mode).build(message -> texts.add(message.data())));
    for (var message : published) assertEquals(List.of(ACK), message.settlements());
    assertEquals(100, texts.stream().distinct().count());
    assertEquals("ready", names().get(0));
    assertEquals("stopped", names().get(names().size() - 1));
    assertEquals(100, names().stream().filter("acked"::equals).count());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void nakComesBackWithItsNextAttempt(Mode mode) throws Exception {
    var message = fake.publish("{}");
    fake.run(
        worker(mode)
            .build(
                one -> {
                  if (one.deliveryCount() < 3) throw new Nak(Duration.ofSeconds(7));
                }));
    assertEquals(List.of(nak(7), nak(7), ACK), message.settlements());
    assertEquals(3, message.attempts());
    assertEquals(List.of("ready", "nacked", "nacked", "acked", "stopped"), names());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void longDelayIsLoweredToOneDay(Mode mode) throws Exception {
    var message = fake.maxDeliver(1).publish("{}");
    Handler<String> handler =
        one -> {
          throw new Nak(Duration.ofDays(9));
        };
    fake.run(worker(mode).build(handler));
    assertEquals(List.of(nak(24 * 3_600)), message.settlements());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void termEndsItsMessageWithTheReason(Mode mode) throws Exception {
    var message = fake.publish("{}");
    Handler<String> handler =
        one -> {
          throw new Term("no such account");
        };
    fake.run(worker(mode).build(handler));
    assertEquals(List.of(new Settlement.Term("no such account")), message.settlements());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void anyOtherErrorIsANakWithAGrowingDelay(Mode mode) throws Exception {
    var message = fake.maxDeliver(8).publish("{}");
    Handler<String> handler =
        one -> {
          throw new UnsupportedOperationException("a defect");
        };
    fake.run(worker(mode).build(handler));
    var delays = List.of(nak(5), nak(10), nak(20), nak(40), nak(80), nak(160), nak(300), nak(300));
    assertEquals(delays, message.settlements());
    var error = (Event.HandlerError) events.get(1);
    assertEquals("a defect", error.error().getMessage());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void undecodablePayloadIsTerminatedAndTheNextIsHandled(Mode mode) throws Exception {
    var wrong = fake.publish("\"five\"");
    var deep = fake.publish("[]");
    var right = fake.publish("5");
    Decoder<Integer> decoder =
        Decoder.json(
            text -> {
              if (text.equals("[]")) throw new StackOverflowError();
              return Integer.valueOf(text);
            });
    fake.run(worker(mode).decode(decoder).build(one -> assertEquals(5, one.data())));
    var term = (Settlement.Term) wrong.settlements().get(0);
    assertTrue(term.reason().contains("NumberFormatException"), term.reason());
    assertTrue(deep.settlements().get(0) instanceof Settlement.Term);
    assertEquals(List.of(ACK), right.settlements());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void payloadThatIsNoJsonNeverReachesAHandler(Mode mode) throws Exception {
    var broken = fake.publish("{\"id\": 1, ");
    var right = fake.publish("{\"id\": [1, 2.5e3, true, null, \"\\u00e9\"], \"x\": {}}");
    fake.run(worker(mode).build(one -> {}));
    assertTrue(broken.settlements().get(0) instanceof Settlement.Term);
    assertEquals(List.of(ACK), right.settlements());
    var rejected = (Event.Rejected) events.get(1);
    assertEquals(broken.sequence(), rejected.rejected().getStreamSequence());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void messageWithoutPayloadHasNoData(Mode mode) throws Exception {
    var headers = Map.of("KV-Operation", List.of("DEL"), "Colour", List.of("red", "green"));
    var tombstone = fake.publish(new byte[0], "kv.key", headers);
    fake.run(
        worker(mode)
            .build(
                one -> {
                  assertNull(one.data());
                  assertEquals("kv.key", one.subject());
                  assertEquals(List.of("red", "green"), one.headers().get("Colour"));
                }));
    assertEquals(List.of(ACK), tombstone.settlements());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void hangingHandlerIsInterruptedAndItsMessageIsLost(Mode mode) throws Exception {
    var interrupted = new CountDownLatch(1);
    var message = fake.publish("{}");
    Handler<String> handler =
        one -> {
          if (one.deliveryCount() > 1) return;
          try {
            new CountDownLatch(1).await();
          } finally {
            interrupted.countDown();
          }
        };
    fake.ackWait(Duration.ofSeconds(3));
    fake.run(worker(mode).atMost(Duration.ofSeconds(1)).build(handler));
    interrupted.await();
    assertEquals(List.of(ACK), message.settlements());
    assertEquals(2, message.attempts());
    assertEquals(List.of("ready", "lost", "acked", "stopped"), names());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void handlerThatCannotBeInterruptedKeepsItsPlace(Mode mode) throws Exception {
    var release = new CountDownLatch(1);
    var others = new AtomicInteger();
    var most = new AtomicInteger();
    fake.ackWait(Duration.ofSeconds(3));
    var message = fake.publish("1");
    Handler<String> handler =
        one -> {
          if (one.data().equals("1") && one.deliveryCount() == 1) {
            for (int i = 0; i < 5; i++) fake.publish("2");
            while (release.getCount() > 0) Thread.onSpinWait();
            return;
          }
          most.accumulateAndGet(others.incrementAndGet(), Math::max);
          Thread.sleep(20);
          others.decrementAndGet();
          if (one.streamSequence() == 6) fake.publish("3");
        };
    fake.run(worker(mode).concurrency(2).atMost(Duration.ofSeconds(1)).build(handler));
    release.countDown();
    assertEquals(List.of(ACK), message.settlements());
    assertEquals(1, most.get(), "the other place stays taken");
    assertTrue(names().contains("lost"), names().toString());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void outcomeOfALostMessageIsDropped(Mode mode) throws Exception {
    fake.ackWait(Duration.ofSeconds(2));
    var message = fake.publish("{}");
    Handler<String> handler =
        one -> {
          if (one.deliveryCount() > 1) return;
          fake.expire(message);
          try {
            new CountDownLatch(1).await();
          } catch (InterruptedException lost) {
            throw new Term("too late");
          }
        };
    fake.run(worker(mode).build(handler));
    assertEquals(List.of(ACK), message.settlements());
    // With Fetch, the next attempt may be acked before the worker hears of the loss.
    var lost = events.stream().filter(event -> event instanceof Event.Lost).toList();
    assertEquals(1, lost.size(), names().toString());
    assertEquals("LEASE_EXPIRED", ((Event.Lost) lost.get(0)).reason());
    assertFalse(names().contains("handler_error"), names().toString());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void leaseThatEndsWithoutAProxyIsLost(Mode mode) throws Exception {
    // The library keeps the threads of a closed client for one second.
    fake.ackWait(Duration.ofSeconds(3)).publish("{}");
    var interrupted = new CountDownLatch(1);
    Handler<String> handler =
        one -> {
          fake.close();
          try {
            new CountDownLatch(1).await();
          } finally {
            interrupted.countDown();
          }
        };
    var worker = worker(mode).grace(Duration.ofSeconds(3)).build(handler);
    var stopper =
        new Thread(
            () -> {
              awaitQuietly(interrupted);
              worker.stop();
            });
    stopper.start();
    worker.run();
    assertEquals(1, names().stream().filter("lost"::equals).count());
    assertEquals("stopped", names().get(names().size() - 1));
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void handlersRunTogetherUpToTheConcurrency(Mode mode) throws Exception {
    IntStream.range(0, 40).forEach(i -> fake.publish("" + i));
    var now = new AtomicInteger();
    var most = new AtomicInteger();
    var all = new CountDownLatch(4);
    Handler<String> handler =
        one -> {
          most.accumulateAndGet(now.incrementAndGet(), Math::max);
          all.countDown();
          all.await(); // Until four are here.
          Thread.sleep(5);
          now.decrementAndGet();
        };
    fake.run(worker(mode).concurrency(4).build(handler));
    assertEquals(4, most.get());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void bytesInHandAreBounded(Mode mode) throws Exception {
    var text = "\"" + "x".repeat(1_000) + "\"";
    IntStream.range(0, 20).forEach(i -> fake.publish(text));
    var now = new AtomicInteger();
    var most = new AtomicInteger();
    Handler<String> handler =
        one -> {
          most.accumulateAndGet(now.incrementAndGet(), Math::max);
          Thread.sleep(10);
          now.decrementAndGet();
        };
    // A batch of one, because an answer may pass the limit.
    fake.run(worker(mode).concurrency(mode == Mode.FETCH ? 1 : 8).maxBytes(2_000).build(handler));
    assertTrue(most.get() <= 2, most + " at once");
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void failingCallIsRepeated(Mode mode) throws Exception {
    fake.fail(mode == Mode.FETCH ? "Fetch" : "Consume", "NATS_UNAVAILABLE");
    fake.fail("Settle", "DRAINING");
    var message = fake.publish("{}");
    fake.run(worker(mode).build(one -> {}));
    assertEquals(List.of(ACK), message.settlements());
    var retry = (Event.Retry) events.get(1);
    assertEquals("NATS_UNAVAILABLE", retry.reason());
    assertTrue(retry.waitTime().toMillis() >= 50, retry.toString());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void failingSettlementIsRepeatedWithTheSameToken(Mode mode) throws Exception {
    fake.failSettlement("LEASE_BUSY");
    fake.failSettlement("SETTLE_UNCONFIRMED");
    var message = fake.publish("{}");
    fake.run(worker(mode).build(one -> {}));
    assertEquals(List.of(ACK), message.settlements());
    assertEquals(1, message.attempts());
    assertEquals(List.of("ready", "retry", "retry", "acked", "stopped"), names());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void messageWhoseSettlementIsRefusedIsLost(Mode mode) throws Exception {
    fake.failSettlement("LEASE_EXPIRED");
    var message = fake.publish("{}");
    var watching =
        new Thread(
            () -> {
              while (!names().contains("lost")) Thread.onSpinWait();
              fake.expire(message);
            });
    watching.start();
    fake.run(worker(mode).build(one -> {}));
    assertEquals(List.of("ready", "lost", "acked", "stopped"), names());
  }

  @ParameterizedTest
  @EnumSource(Mode.class)
  void refusalEndsTheRun(Mode mode) {
    fake.fail(mode == Mode.FETCH ? "Fetch" : "Consume", "NOT_ALLOWED");
    var worker = worker(mode).build(one -> {});
    var refused = assertThrows(FetchProxyException.class, worker::run);
    assertEquals("NOT_ALLOWED", refused.reason());
    assertEquals(List.of("ready"), names());
  }

  @Test
  void requestThatIsTooLargeIsNotRepeated() {
    fake.fail("Fetch", "REQUEST_TOO_LARGE");
    var refused = assertThrows(FetchProxyException.class, worker(Mode.FETCH).build(one -> {})::run);
    assertEquals("REQUEST_TOO_LARGE", refused.reason());
  }

  @Test
  void failingListenerDoesNoHarm() throws Exception {
    var message = fake.publish("{}");
    var worker =
        Worker.builder(fake.client(), "TASKS", "worker")
            .onEvent(
                event -> {
                  throw new IllegalStateException("the listener of the test fails");
                })
            .build(one -> {});
    fake.run(worker);
    assertEquals(List.of(ACK), message.settlements());
  }

  @Test
  void wrongOptionIsRefusedBeforeAnyCall() {
    var builder = Worker.builder(fake.client(), "TASKS", "worker").concurrency(0);
    var wrong = assertThrows(IllegalArgumentException.class, () -> builder.build(one -> {}));
    assertEquals("concurrency is 0, but must be 1 to 1000", wrong.getMessage());
    var graceful = worker(Mode.CONSUME).grace(Duration.ofHours(1));
    assertThrows(IllegalArgumentException.class, () -> graceful.build(one -> {}));
  }
}
