package io.fetchproxy.client.otel;

import io.fetchproxy.client.HandlerTracer;
import io.fetchproxy.client.Message;
import io.fetchproxy.client.Nak;
import io.fetchproxy.client.Term;
import io.opentelemetry.api.trace.Span;
import io.opentelemetry.api.trace.SpanKind;
import io.opentelemetry.api.trace.StatusCode;
import io.opentelemetry.api.trace.Tracer;
import io.opentelemetry.api.trace.propagation.W3CTraceContextPropagator;
import io.opentelemetry.context.Context;
import io.opentelemetry.context.Scope;
import io.opentelemetry.context.propagation.TextMapGetter;
import java.util.List;
import java.util.Map;

/**
 * Makes a span around each handler. Its parent comes from the headers {@code traceparent} and
 * {@code tracestate} of the message.
 */
public final class OpenTelemetryTracer implements HandlerTracer {
  @SuppressWarnings("deprecation") // An older version of the library demands keys.
  private static final TextMapGetter<Map<String, List<String>>> FIRST_VALUE =
      new TextMapGetter<>() {
        @Override
        public Iterable<String> keys(Map<String, List<String>> headers) {
          return headers.keySet();
        }

        @Override
        public String get(Map<String, List<String>> headers, String name) {
          var named = headers.keySet().stream().filter(name::equalsIgnoreCase).findFirst();
          return named.map(found -> headers.get(found).get(0)).orElse(null);
        }
      };

  private final Tracer tracer;

  /**
   * Makes a tracer for workers.
   *
   * @param tracer the tracer that makes the spans
   */
  public OpenTelemetryTracer(Tracer tracer) {
    this.tracer = tracer;
  }

  @Override
  public void trace(String stream, String consumer, Message<?> message, Call handler)
      throws Exception {
    Context parent =
        W3CTraceContextPropagator.getInstance()
            .extract(Context.root(), message.headers(), FIRST_VALUE);
    Span span =
        tracer
            .spanBuilder("process " + stream)
            .setSpanKind(SpanKind.CONSUMER)
            .setParent(parent)
            .setAttribute("messaging.system", "fetchproxy")
            .setAttribute("messaging.operation.type", "process")
            .setAttribute("messaging.destination.name", stream)
            .setAttribute("messaging.consumer.group.name", consumer)
            .setAttribute("messaging.message.id", String.valueOf(message.streamSequence()))
            .startSpan();
    Scope scope = span.makeCurrent();
    try {
      handler.run();
    } catch (Nak | Term outcome) {
      span.setStatus(StatusCode.ERROR, outcome.getMessage());
      throw outcome;
    } catch (Throwable failure) {
      span.setStatus(StatusCode.ERROR, String.valueOf(failure.getMessage()));
      span.recordException(failure);
      throw failure;
    } finally {
      scope.close();
      span.end();
    }
  }
}
