package io.fetchproxy.client;

import com.google.protobuf.MessageLite;
import io.fetchproxy.v1.AckRequest;
import io.fetchproxy.v1.ExtendRequest;
import io.fetchproxy.v1.FetchRequest;
import io.fetchproxy.v1.FetchResponse;
import io.fetchproxy.v1.FetchServiceGrpc;
import io.fetchproxy.v1.FetchServiceGrpc.FetchServiceBlockingStub;
import io.fetchproxy.v1.FetchServiceGrpc.FetchServiceStub;
import io.fetchproxy.v1.GiveBackRequest;
import io.fetchproxy.v1.NakRequest;
import io.fetchproxy.v1.SettleRequest;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.fetchproxy.v1.TermRequest;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;

/**
 * One channel to one proxy, or to all replicas of a name. It may be shared by threads and workers.
 *
 * <p>Each call has a deadline, and is made at most 5 times if its reason is worth a repeat. A call
 * that fails throws {@link FetchProxyException}.
 */
public final class Client implements AutoCloseable {
  /** How often a call is made. */
  private static final int MOST_TRIES = 5;

  // All times are in milliseconds.
  /** The deadline of every call but a Fetch. */
  private static final long DEADLINE = 10_000;

  /** A Fetch has this time in addition to its wait. The proxy answers well before. */
  private static final long PATIENCE = 5_000;

  /** The longest wait of a Fetch that names none. */
  private static final long MAX_WAIT = 10_000;

  /** The deadline of a GiveBack after a Fetch that was cancelled. */
  private static final long FAREWELL = 1_000;

  private final ManagedChannel channel;
  private final FetchServiceBlockingStub stub;

  private Client(ManagedChannel channel) {
    this.channel = channel;
    this.stub = FetchServiceGrpc.newBlockingStub(channel);
  }

  /**
   * Begins to make a client.
   *
   * @param address {@code host:port}, {@code https://host:port} with TLS, or {@code
   *     dns:///name:port} for all replicas of a name
   * @return a builder
   */
  public static Builder builder(String address) {
    return new Builder(address);
  }

  /**
   * Makes a client with the options that the environment has: FETCH_PROXY_ADDR (127.0.0.1:50051 if
   * it is not set), FETCH_PROXY_CA, FETCH_PROXY_CERT, FETCH_PROXY_KEY and FETCH_PROXY_BEARER_FILE.
   *
   * @return a client, which connects at its first call
   */
  public static Client fromEnv() {
    return fromEnv(System.getenv());
  }

  static Client fromEnv(Map<String, String> env) {
    Function<String, Path> file = name -> env.containsKey(name) ? Path.of(env.get(name)) : null;
    return builder(env.getOrDefault("FETCH_PROXY_ADDR", "127.0.0.1:50051"))
        .ca(file.apply("FETCH_PROXY_CA"))
        .cert(file.apply("FETCH_PROXY_CERT"), file.apply("FETCH_PROXY_KEY"))
        .bearerFile(file.apply("FETCH_PROXY_BEARER_FILE"))
        .build();
  }

  /**
   * Makes a client of a channel of your own. It should accept messages of 17 MiB.
   *
   * @param channel the channel, which {@link #close} ends
   * @return a client
   */
  public static Client of(ManagedChannel channel) {
    return new Client(channel);
  }

  /** The options of a client. */
  public static final class Builder {
    private final String address;
    private Path ca;
    private Path cert;
    private Path key;
    private Path bearerFile;

    private Builder(String address) {
      this.address = address;
    }

    /**
     * Sets the authorities to trust, in place of those of the system.
     *
     * @param file their certificates, PEM; null for none
     * @return this builder
     */
    public Builder ca(Path file) {
      ca = file;
      return this;
    }

    /**
     * Sets the certificate of the worker.
     *
     * @param cert the file of the certificate, PEM; null for none
     * @param key the file of its key, PEM; null for none
     * @return this builder
     */
    public Builder cert(Path cert, Path key) {
      this.cert = cert;
      this.key = key;
      return this;
    }

    /**
     * Sets the API key or the token that goes with each call.
     *
     * @param file the file of the key or token; null for none
     * @return this builder
     */
    public Builder bearerFile(Path file) {
      bearerFile = file;
      return this;
    }

    /**
     * Makes the client, which connects at its first call.
     *
     * @return a client
     * @throws IllegalArgumentException if a credential would be sent without TLS to another machine
     */
    public Client build() {
      try {
        return new Client(Connection.open(address, ca, cert, key, bearerFile));
      } catch (IOException | GeneralSecurityException unreadable) {
        throw new IllegalArgumentException(unreadable.getMessage(), unreadable);
      }
    }
  }

  /**
   * Takes messages, and leases each to the caller. Repeats have the same attempt, so an answer that
   * was lost comes again. If the thread is interrupted, the attempt is given back.
   *
   * @param request {@code stream} and {@code consumer} are required; {@code max_wait} is 10 s and
   *     {@code max_bytes} is 16 MiB if they are not set
   * @return the answer: messages, rejected messages, and why there is none
   */
  public FetchResponse fetch(FetchRequest request) {
    var attempt = request.toBuilder();
    if (!request.hasMaxWait()) attempt.setMaxWait(Times.duration(MAX_WAIT));
    if (request.getMaxBytes() == 0) attempt.setMaxBytes(Connection.MAX_BYTES);
    if (request.getAttemptId().isEmpty()) attempt.setAttemptId(newAttempt());
    try {
      return tried(
          again -> {
            attempt.setAttemptAgain(again || request.getAttemptAgain());
            return fetchOnce(attempt.build());
          });
    } catch (FetchProxyException failure) {
      if (Thread.interrupted()) {
        giveUp(attempt.build());
        Thread.currentThread().interrupt();
      }
      throw failure;
    }
  }

  /**
   * Settles a message as done.
   *
   * @param token the token of the message
   * @return the outcome, which is a success
   */
  public io.fetchproxy.v1.Outcome ack(String token) {
    var request = AckRequest.newBuilder().setToken(token).build();
    return tried(again -> within(DEADLINE).ack(request)).getOutcome();
  }

  /**
   * Settles a message as not done: it comes back after the delay.
   *
   * @param token the token of the message
   * @param delay the delay; longer than 24 h is lowered to 24 h
   * @return the outcome, which is a success
   */
  public io.fetchproxy.v1.Outcome nak(String token, Duration delay) {
    var lowered = Times.duration(Outcome.limited(delay));
    var request = NakRequest.newBuilder().setToken(token).setDelay(lowered).build();
    return tried(again -> within(DEADLINE).nak(request)).getOutcome();
  }

  /**
   * Settles a message as impossible: it does not come back.
   *
   * @param token the token of the message
   * @param reason the reason, which is cut to 1 KiB of UTF-8
   * @return the outcome, which is a success
   */
  public io.fetchproxy.v1.Outcome term(String token, String reason) {
    var request = TermRequest.newBuilder().setToken(token).setReason(Outcome.cut(reason)).build();
    return tried(again -> within(DEADLINE).term(request)).getOutcome();
  }

  /**
   * Moves the end of a lease.
   *
   * @param token the token of the message
   * @param lease the time from now, at least 1 s; null for as long as it was granted
   * @return the time that is left
   */
  public Duration extend(String token, Duration lease) {
    var request = ExtendRequest.newBuilder().setToken(token);
    if (lease != null) request.setLease(Times.duration(lease));
    return Times.of(tried(again -> within(DEADLINE).extend(request.build())).getLease());
  }

  /**
   * Settles or extends many leases in one call. Parts that are worth a repeat are repeated.
   *
   * @param settlements 1 to 1000 settlements
   * @return one result for each settlement, in their order: look at its error
   */
  public List<SettleResult> settle(List<Settlement> settlements) {
    var results = new ArrayList<SettleResult>(settlements.size());
    settlements.forEach(each -> results.add(null));
    for (int tries = 1; ; tries++) {
      var open = new ArrayList<Integer>();
      for (int i = 0; i < results.size(); i++) {
        if (results.get(i) == null || failure(results.get(i)) != null) open.add(i);
      }
      open.removeIf(i -> results.get(i) != null && !failure(results.get(i)).isRepeatable());
      if (!open.isEmpty()) {
        var request = SettleRequest.newBuilder();
        open.forEach(i -> request.addSettlements(settlements.get(i)));
        var answer = tried(again -> within(DEADLINE).settle(request.build()));
        for (int i = 0; i < open.size(); i++) results.set(open.get(i), answer.getResults(i));
      }
      FetchProxyException worthIt = null;
      for (SettleResult result : results) {
        var failure = failure(result);
        if (failure != null && failure.isRepeatable()) worthIt = failure;
      }
      if (worthIt == null || tries == MOST_TRIES) return results;
      pause(worthIt, tries - 1);
    }
  }

  /**
   * Gives back all that a Fetch has leased.
   *
   * @param stream the stream of the Fetch
   * @param consumer the consumer of the Fetch
   * @param attemptId the attempt of the Fetch
   * @return the number of messages that were given back
   */
  public int giveBack(String stream, String consumer, String attemptId) {
    var request =
        GiveBackRequest.newBuilder()
            .setStream(stream)
            .setConsumer(consumer)
            .setAttemptId(attemptId)
            .build();
    return tried(again -> within(DEADLINE).giveBack(request)).getMessages();
  }

  /** Ends the channel, and all calls that still run. */
  @Override
  public void close() {
    channel.shutdownNow();
  }

  /** Null if the settlement succeeded. */
  static FetchProxyException failure(SettleResult result) {
    return result.hasError() ? FetchProxyException.of(result.getError()) : null;
  }

  static String newAttempt() {
    return UUID.randomUUID().toString();
  }

  /** One call, which may fail. */
  FetchResponse fetchOnce(FetchRequest request) {
    return within(Times.millis(request.getMaxWait()) + PATIENCE).fetch(request);
  }

  /**
   * Gives back an attempt whose answer nobody reads. If it fails, its messages come back when their
   * leases end.
   */
  void giveUp(FetchRequest attempt) {
    var request =
        GiveBackRequest.newBuilder()
            .setStream(attempt.getStream())
            .setConsumer(attempt.getConsumer())
            .setAttemptId(attempt.getAttemptId());
    try {
      within(FAREWELL).giveBack(request.build());
    } catch (StatusRuntimeException error) {
      // Nothing else can be done about it.
    }
  }

  FetchServiceBlockingStub within(long timeout) {
    return stub.withDeadlineAfter(timeout, TimeUnit.MILLISECONDS);
  }

  /** The stub for a stream, which has no deadline. */
  FetchServiceStub streaming() {
    return FetchServiceGrpc.newStub(channel);
  }

  /** By itself, the channel would wait for up to two minutes before it connects again. */
  void reconnectSoon() {
    channel.resetConnectBackoff();
  }

  private interface Call<A extends MessageLite> {
    A make(boolean again);
  }

  private <A extends MessageLite> A tried(Call<A> call) {
    for (int tries = 1; ; tries++) {
      try {
        return call.make(tries > 1);
      } catch (StatusRuntimeException error) {
        var failure = FetchProxyException.of(error);
        boolean interrupted = Thread.currentThread().isInterrupted();
        if (interrupted || !failure.isRepeatable() || tries == MOST_TRIES) throw failure;
        pause(failure, tries - 1);
      }
    }
  }

  private void pause(FetchProxyException failure, int failed) {
    reconnectSoon();
    try {
      Thread.sleep(Times.waitAfter(failure, failed));
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
      throw FetchProxyException.of(
          Status.CANCELLED.withDescription("interrupted").asRuntimeException());
    }
  }
}
