package io.fetchproxy.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.fetchproxy.client.testing.FakeProxy;
import io.fetchproxy.v1.AckAction;
import io.fetchproxy.v1.AckRequest;
import io.fetchproxy.v1.AckResponse;
import io.fetchproxy.v1.Delivery;
import io.fetchproxy.v1.EmptyReason;
import io.fetchproxy.v1.FetchRequest;
import io.fetchproxy.v1.FetchServiceGrpc.FetchServiceImplBase;
import io.fetchproxy.v1.NakAction;
import io.fetchproxy.v1.Outcome;
import io.fetchproxy.v1.Settlement;
import io.grpc.Grpc;
import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.stub.StreamObserver;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CopyOnWriteArrayList;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;

/** Single calls, and credentials. */
@Timeout(60)
final class ClientTest {
  private final FakeProxy fake = new FakeProxy();
  private final Client client = fake.client();

  @AfterEach
  void close() {
    fake.close();
  }

  private static FetchRequest.Builder request() {
    return FetchRequest.newBuilder().setStream("TASKS").setConsumer("worker").setN(10);
  }

  private Delivery one() {
    fake.publish("{}");
    return client.fetch(request().build()).getMessages(0);
  }

  @Test
  void eachCallGivesItsOutcome() {
    assertEquals(Outcome.OUTCOME_CONFIRMED, client.ack(one().getToken()));
    assertEquals(Outcome.OUTCOME_CONFIRMED, client.term(one().getToken(), "no use"));
    String token = one().getToken();
    assertEquals(Duration.ofSeconds(9), client.extend(token, Duration.ofSeconds(9)));
    assertEquals(Duration.ofSeconds(30), client.extend(token, null));
    assertEquals(Outcome.OUTCOME_CONFIRMED, client.nak(token, Duration.ofDays(2)));
    assertEquals(Outcome.OUTCOME_DUPLICATE, client.nak(token, Duration.ofDays(2)));
    var day = new io.fetchproxy.client.testing.Settlement.Nak(Duration.ofHours(24));
    assertEquals(List.of(day), fake.messages().get(2).settlements());
  }

  @Test
  void failedCallSaysWhy() {
    String token = one().getToken();
    client.ack(token);
    var settled =
        assertThrows(FetchProxyException.class, () -> client.term(token, "it is too late"));
    assertEquals("LEASE_SETTLED", settled.reason());
    assertEquals(Status.Code.FAILED_PRECONDITION, settled.code());
    assertFalse(settled.isRepeatable());
    assertTrue(settled.retryDelay().isEmpty());
  }

  @Test
  void callThatMaySucceedLaterIsRepeated() {
    String token = one().getToken();
    fake.fail("Ack", "NATS_UNAVAILABLE");
    assertEquals(Outcome.OUTCOME_CONFIRMED, client.ack(token));
    fake.fail("Fetch", "CONSUMER_BUSY");
    one();
  }

  @Test
  void refusedCallIsNotRepeated() {
    fake.fail("Fetch", "CONSUMER_NOT_FOUND");
    fake.publish("{}");
    assertThrows(FetchProxyException.class, () -> client.fetch(request().build()));
    assertEquals(0, fake.messages().get(0).attempts());
  }

  @Test
  void settleGivesAResultForEachPart() {
    var ack = Settlement.newBuilder().setAck(AckAction.getDefaultInstance());
    var nak = Settlement.newBuilder().setNak(NakAction.getDefaultInstance());
    fake.fail("Settle", "DRAINING");
    var parts = List.of(ack.setToken(one().getToken()).build(), nak.setToken("none").build());
    var results = client.settle(parts);
    assertEquals(Outcome.OUTCOME_CONFIRMED, results.get(0).getOutcome());
    assertEquals("TOKEN_INVALID", results.get(1).getError().getReason());
  }

  @Test
  void emptyAnswerSaysWhy() {
    var none = Times.duration(Duration.ZERO);
    var answer = client.fetch(request().setMaxWait(none).build());
    assertEquals(EmptyReason.EMPTY_REASON_NO_MESSAGES, answer.getEmptyReason());
  }

  @Test
  void attemptIsGivenBack() {
    fake.publish("{}");
    client.fetch(request().setAttemptId("mine").build());
    assertEquals(1, client.giveBack("TASKS", "worker", "mine"));
    assertEquals(1, client.fetch(request().build()).getMessages(0).getDeliveryCount());
  }

  @Test
  void fetchOfAnInterruptedThreadIsGivenBack() throws Exception {
    var fetching = new Thread(() -> client.fetch(request().setAttemptId("mine").build()));
    fetching.setUncaughtExceptionHandler((thread, cancelled) -> {});
    fetching.start();
    while (fetching.getState() == Thread.State.NEW) Thread.onSpinWait();
    fetching.interrupt();
    fetching.join();
    // An attempt that was given back is over.
    fake.publish("{}");
    var answer = client.fetch(request().setAttemptId("mine").build());
    assertEquals(EmptyReason.EMPTY_REASON_ATTEMPT_OVER, answer.getEmptyReason());
  }

  @Test
  void credentialIsNotSentToAnotherMachineWithoutTls(@TempDir Path folder) throws Exception {
    var file = Files.writeString(folder.resolve("key"), "secret");
    var builder = Client.builder("proxy.example:50051").bearerFile(file);
    var refused = assertThrows(IllegalArgumentException.class, builder::build);
    assertTrue(refused.getMessage().contains("without TLS: use https://"));
    Client.builder("https://proxy.example:50051").bearerFile(file).build().close();
    var env = Map.of("FETCH_PROXY_BEARER_FILE", file.toString());
    Client.fromEnv(env).close(); // To this machine.
  }

  @Test
  void changedBearerFileCountsWithoutARestart(@TempDir Path folder) throws Exception {
    var seen = new CopyOnWriteArrayList<String>();
    var key = Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
    var service =
        new FetchServiceImplBase() {
          @Override
          public void ack(AckRequest request, StreamObserver<AckResponse> observer) {
            observer.onNext(AckResponse.getDefaultInstance());
            observer.onCompleted();
          }
        };
    var watching =
        new ServerInterceptor() {
          @Override
          public <Q, A> ServerCall.Listener<Q> interceptCall(
              ServerCall<Q, A> call, Metadata headers, ServerCallHandler<Q, A> next) {
            seen.add(headers.get(key));
            return next.startCall(call, headers);
          }
        };
    var server =
        Grpc.newServerBuilderForPort(0, InsecureServerCredentials.create())
            .addService(service)
            .intercept(watching)
            .build()
            .start();
    var file = Files.writeString(folder.resolve("key"), "first\n");
    try (var real = Client.builder("127.0.0.1:" + server.getPort()).bearerFile(file).build()) {
      real.ack("token");
      Files.writeString(file, "the second\n");
      real.ack("token");
    } finally {
      server.shutdownNow();
    }
    assertEquals(List.of("Bearer first", "Bearer the second"), seen);
  }
}
