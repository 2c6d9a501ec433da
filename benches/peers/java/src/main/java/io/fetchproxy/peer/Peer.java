package io.fetchproxy.peer;

import com.google.protobuf.Duration;
import io.fetchproxy.client.Client;
import io.fetchproxy.client.Decoder;
import io.fetchproxy.client.Worker;
import io.fetchproxy.v1.AckAction;
import io.fetchproxy.v1.AckRequest;
import io.fetchproxy.v1.FetchRequest;
import io.fetchproxy.v1.FetchServiceGrpc;
import io.fetchproxy.v1.SettleRequest;
import io.fetchproxy.v1.Settlement;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.nats.client.Connection;
import io.nats.client.ConsumerContext;
import io.nats.client.FetchConsumeOptions;
import io.nats.client.Message;
import io.nats.client.Nats;
import java.util.ArrayList;
import java.util.Scanner;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicReference;

/**
 * Does the work of one mode for each line that it reads, for the bench that compares native clients.
 *
 * <p>A line is: MODE CONSUMER WORKERS MESSAGES. The answer is: done COUNT. All workers of a
 * kind share one connection.
 */
public final class Peer {
  private static final String STREAM = System.getenv("STREAM");
  private static final java.time.Duration WAIT = java.time.Duration.ofSeconds(1);

  private static Connection nats;
  private static Client client;
  private static FetchServiceGrpc.FetchServiceBlockingStub stub;

  /** Returns a round: fetches up to n messages and confirms each, all acks at once. */
  private static Callable<Integer> nativeRound(ConsumerContext consumer, int n) {
    if (n == 1) {
      return () -> {
        Message message = consumer.next(WAIT);
        if (message == null) {
          return 0;
        }
        message.ackSync(WAIT);
        return 1;
      };
    }
    var options =
        FetchConsumeOptions.builder().maxMessages(n).expiresIn(WAIT.toMillis()).build();
    return () -> {
      var acks = new ArrayList<CompletableFuture<Message>>();
      try (var batch = consumer.fetch(options)) {
        Message message;
        while ((message = batch.nextMessage()) != null) {
          acks.add(nats.request(message.getReplyTo(), "+ACK".getBytes()));
        }
      }
      for (var ack : acks) {
        ack.get();
      }
      return acks.size();
    };
  }

  /** Returns a round. One message is acked by an Ack, more by a Settle. */
  private static Callable<Integer> proxiedRound(String consumer, int n) {
    var wait = Duration.newBuilder().setSeconds(WAIT.toSeconds());
    var request = FetchRequest.newBuilder().setStream(STREAM).setConsumer(consumer).setN(n);
    var fetch = request.setMaxWait(wait).build();
    return () -> {
      var messages = stub.fetch(fetch).getMessagesList();
      if (n == 1) {
        for (var message : messages) {
          stub.ack(AckRequest.newBuilder().setToken(message.getToken()).build());
        }
      } else if (!messages.isEmpty()) {
        var settle = SettleRequest.newBuilder();
        for (var message : messages) {
          var ack = AckAction.getDefaultInstance();
          settle.addSettlements(
              Settlement.newBuilder().setToken(message.getToken()).setAck(ack));
        }
        if (stub.settle(settle.build()).getFailed() > 0) {
          throw new IllegalStateException("settlements failed");
        }
      }
      return messages.size();
    };
  }

  /** Runs a worker of the client package until so many messages are acked. Returns their number. */
  private static int packaged(String consumer, int concurrency, int messages) throws Exception {
    var done = new AtomicInteger();
    var worker = new AtomicReference<Worker>();
    worker.set(
        Worker.builder(client, STREAM, consumer)
            .decode(Decoder.bytes())
            .concurrency(concurrency)
            .build(
                message -> {
                  if (done.incrementAndGet() == messages) {
                    worker.get().stop();
                  }
                }));
    worker.get().run();
    return done.get();
  }

  private static int work(ExecutorService pool, Callable<Integer> round, int workers, int messages)
      throws Exception {
    var done = new AtomicInteger();
    Callable<Void> worker =
        () -> {
          while (done.get() < messages) {
            done.addAndGet(round.call());
          }
          return null;
        };
    var running = new ArrayList<Future<Void>>();
    for (int at = 0; at < workers; at++) {
      running.add(pool.submit(worker));
    }
    for (var ended : running) {
      ended.get();
    }
    return done.get();
  }

  public static void main(String[] arguments) throws Exception {
    nats = Nats.connect(System.getenv("NATS_URL"));
    var target = System.getenv("FETCH_PROXY_ADDR");
    var channel = Grpc.newChannelBuilder(target, InsecureChannelCredentials.create()).build();
    stub = FetchServiceGrpc.newBlockingStub(channel);
    client = Client.builder(target).build();
    var pool = Executors.newCachedThreadPool();
    var lines = new Scanner(System.in);
    System.out.println("ready");
    while (lines.hasNext()) {
      var mode = lines.next().split("-");
      var consumer = lines.next();
      int n = Integer.parseInt(mode[1]);
      if (mode[0].equals("package")) {
        lines.nextInt(); // One worker with many handlers.
        System.out.println("done " + packaged(consumer, n, lines.nextInt()));
        continue;
      }
      var round =
          mode[0].equals("native")
              ? nativeRound(nats.getStreamContext(STREAM).getConsumerContext(consumer), n)
              : proxiedRound(consumer, n);
      System.out.println("done " + work(pool, round, lines.nextInt(), lines.nextInt()));
    }
    channel.shutdownNow();
    client.close();
    nats.close();
    System.exit(0);
  }
}
