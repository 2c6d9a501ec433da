package io.fetchproxy.client.testing;

import com.google.protobuf.Any;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.fetchproxy.v1.AckAction;
import io.fetchproxy.v1.AckRequest;
import io.fetchproxy.v1.AckResponse;
import io.fetchproxy.v1.ConsumeRequest;
import io.fetchproxy.v1.ConsumeResponse;
import io.fetchproxy.v1.EmptyReason;
import io.fetchproxy.v1.ExtendAction;
import io.fetchproxy.v1.ExtendRequest;
import io.fetchproxy.v1.ExtendResponse;
import io.fetchproxy.v1.FetchRequest;
import io.fetchproxy.v1.FetchResponse;
import io.fetchproxy.v1.FetchServiceGrpc.FetchServiceImplBase;
import io.fetchproxy.v1.GiveBackRequest;
import io.fetchproxy.v1.GiveBackResponse;
import io.fetchproxy.v1.NakAction;
import io.fetchproxy.v1.NakRequest;
import io.fetchproxy.v1.NakResponse;
import io.fetchproxy.v1.SettleError;
import io.fetchproxy.v1.SettleRequest;
import io.fetchproxy.v1.SettleResponse;
import io.fetchproxy.v1.SettleResult;
import io.fetchproxy.v1.Settlement;
import io.fetchproxy.v1.TermAction;
import io.fetchproxy.v1.TermRequest;
import io.fetchproxy.v1.TermResponse;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ScheduledExecutorService;
import java.util.function.Function;

/** The calls of the contract, on the messages of the fake. */
final class FakeService extends FetchServiceImplBase {
  private static final long LOOK = 50; // How often a Fetch that waits looks for its cancelling.

  private final FakeQueue queue;
  private final ScheduledExecutorService timer;
  private final Map<String, Deque<String>> failures = new HashMap<>(); // By method.

  FakeService(FakeQueue queue, ScheduledExecutorService timer) {
    this.queue = queue;
    this.timer = timer;
  }

  /** The next call of the method fails. */
  void fail(String method, String reason) {
    Reasons.codeOf(reason);
    synchronized (queue) {
      failures.computeIfAbsent(method, none -> new ArrayDeque<>()).add(reason);
    }
  }

  private static StatusRuntimeException failure(String reason, String text) {
    Status.Code code = Reasons.codeOf(reason);
    var info = ErrorInfo.newBuilder().setDomain("fetchproxy").setReason(reason);
    var status = com.google.rpc.Status.newBuilder().setCode(code.value()).setMessage(text);
    status.addDetails(Any.pack(info.build()));
    if (Reasons.isWorthAWait(reason)) {
      status.addDetails(Any.pack(RetryInfo.newBuilder().setRetryDelay(Reasons.WAIT).build()));
    }
    return StatusProto.toStatusRuntimeException(status.build());
  }

  /** Null if the call may be made. */
  private StatusRuntimeException failure(String method) {
    synchronized (queue) {
      Deque<String> reasons = failures.get(method);
      boolean none = reasons == null || reasons.isEmpty();
      return none ? null : failure(reasons.poll(), "the test wants it so");
    }
  }

  private interface Call<A> {
    A answer() throws StatusRuntimeException;
  }

  private <A> void answer(String method, StreamObserver<A> observer, Call<A> call) {
    try {
      var failure = failure(method);
      if (failure != null) throw failure;
      observer.onNext(call.answer());
      observer.onCompleted();
    } catch (StatusRuntimeException failure) {
      observer.onError(failure);
    }
  }

  private SettleResult settled(Settlement settlement) {
    return queue.settle(settlement.getToken(), settlement);
  }

  /** The result of one settlement, as the answer of its own call. */
  private <A> A settled(Settlement.Builder settlement, Function<SettleResult, A> answer) {
    SettleResult result = settled(settlement.build());
    SettleError error = result.getError();
    if (result.hasError()) throw failure(error.getReason(), error.getMessage());
    return answer.apply(result);
  }

  @Override
  public void ack(AckRequest request, StreamObserver<AckResponse> observer) {
    var part = Settlement.newBuilder().setToken(request.getToken());
    part.setAck(AckAction.getDefaultInstance());
    Function<SettleResult, AckResponse> with =
        result -> AckResponse.newBuilder().setOutcome(result.getOutcome()).build();
    answer("Ack", observer, () -> settled(part, with));
  }

  @Override
  public void nak(NakRequest request, StreamObserver<NakResponse> observer) {
    var part = Settlement.newBuilder().setToken(request.getToken());
    part.setNak(NakAction.newBuilder().setDelay(request.getDelay()));
    Function<SettleResult, NakResponse> with =
        result -> NakResponse.newBuilder().setOutcome(result.getOutcome()).build();
    answer("Nak", observer, () -> settled(part, with));
  }

  @Override
  public void term(TermRequest request, StreamObserver<TermResponse> observer) {
    var part = Settlement.newBuilder().setToken(request.getToken());
    part.setTerm(TermAction.newBuilder().setReason(request.getReason()));
    Function<SettleResult, TermResponse> with =
        result -> TermResponse.newBuilder().setOutcome(result.getOutcome()).build();
    answer("Term", observer, () -> settled(part, with));
  }

  @Override
  public void extend(ExtendRequest request, StreamObserver<ExtendResponse> observer) {
    var extend = ExtendAction.newBuilder();
    if (request.hasLease()) extend.setLease(request.getLease());
    var part = Settlement.newBuilder().setToken(request.getToken()).setExtend(extend);
    Function<SettleResult, ExtendResponse> with =
        result -> ExtendResponse.newBuilder().setLease(result.getLease()).build();
    answer("Extend", observer, () -> settled(part, with));
  }

  @Override
  public void settle(SettleRequest request, StreamObserver<SettleResponse> observer) {
    answer(
        "Settle",
        observer,
        () -> {
          List<SettleResult> results =
              request.getSettlementsList().stream().map(this::settled).toList();
          int failed = (int) results.stream().filter(SettleResult::hasError).count();
          return SettleResponse.newBuilder().addAllResults(results).setFailed(failed).build();
        });
  }

  @Override
  public void giveBack(GiveBackRequest request, StreamObserver<GiveBackResponse> observer) {
    answer(
        "GiveBack",
        observer,
        () -> {
          int messages = queue.giveBack(request.getAttemptId());
          return GiveBackResponse.newBuilder().setMessages(messages).build();
        });
  }

  @Override
  public void fetch(FetchRequest request, StreamObserver<FetchResponse> observer) {
    var call = (ServerCallStreamObserver<FetchResponse>) observer;
    call.setOnCancelHandler(() -> {}); // Otherwise an answer that comes too late throws.
    answer("Fetch", observer, () -> fetched(request, call));
  }

  private FetchResponse fetched(
      FetchRequest request, ServerCallStreamObserver<FetchResponse> call) {
    var answer = FetchResponse.newBuilder();
    request.getSettlementsList().forEach(part -> answer.addResults(settled(part)));
    int failed = (int) answer.getResultsList().stream().filter(SettleResult::hasError).count();
    if (failed > 0) {
      return answer.setFailed(failed).setEmptyReason(EmptyReason.EMPTY_REASON_SETTLE).build();
    }
    long most = request.hasMaxWait() ? FakeQueue.millis(request.getMaxWait()) : 30_000;
    long until = FakeQueue.now() + most;
    synchronized (queue) {
      while (true) {
        if (queue.isOver(request.getAttemptId())) {
          return answer.setEmptyReason(EmptyReason.EMPTY_REASON_ATTEMPT_OVER).build();
        }
        if (!call.isCancelled()) take(request, answer);
        boolean isFound = answer.getMessagesCount() + answer.getRejectedCount() > 0;
        long left = until - FakeQueue.now();
        if (isFound || left <= 0 || call.isCancelled()) break;
        try {
          queue.wait(Math.min(left, LOOK));
        } catch (InterruptedException shutdown) {
          throw failure("DRAINING", "the fake is closed");
        }
      }
    }
    if (answer.getMessagesCount() > 0) return answer.build();
    boolean rejected = answer.getRejectedCount() > 0;
    var why = rejected ? EmptyReason.EMPTY_REASON_REJECTED : EmptyReason.EMPTY_REASON_NO_MESSAGES;
    return answer.setEmptyReason(why).build();
  }

  /** A repeat has the messages of the first call. */
  private void take(FetchRequest request, FetchResponse.Builder answer) {
    String name = request.getAttemptId();
    if (!name.isEmpty()) {
      for (var lease : queue.ofAttempt(name)) {
        answer.addMessages(queue.delivery(lease, request.getCodec(), 0));
      }
      if (answer.getMessagesCount() > 0) return;
    }
    long length = request.hasLease() ? FakeQueue.millis(request.getLease()) : queue.ackWait;
    while (answer.getMessagesCount() < Math.max(request.getN(), 1)) {
      var lease = queue.take(name, length);
      if (lease == null) return;
      var refused = queue.refused(lease, request.getCodec());
      if (refused != null) answer.addRejected(refused);
      else answer.addMessages(queue.delivery(lease, request.getCodec(), 0));
    }
  }

  @Override
  public StreamObserver<ConsumeRequest> consume(StreamObserver<ConsumeResponse> observer) {
    var call = (ServerCallStreamObserver<ConsumeResponse>) observer;
    var stream = new FakeStream(queue, timer, call);
    var failure = failure("Consume");
    if (failure == null) stream.open();
    else stream.refuse(failure);
    return stream;
  }
}
