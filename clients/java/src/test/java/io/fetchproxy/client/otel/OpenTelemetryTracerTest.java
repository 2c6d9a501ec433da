package io.fetchproxy.client.otel;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.fetchproxy.client.Term;
import io.fetchproxy.client.Worker;
import io.fetchproxy.client.testing.FakeProxy;
import io.opentelemetry.api.common.AttributeKey;
import io.opentelemetry.api.trace.Span;
import io.opentelemetry.api.trace.SpanKind;
import io.opentelemetry.api.trace.StatusCode;
import io.opentelemetry.sdk.testing.exporter.InMemorySpanExporter;
import io.opentelemetry.sdk.trace.SdkTracerProvider;
import io.opentelemetry.sdk.trace.export.SimpleSpanProcessor;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

/** The span of a handler. */
@Timeout(60)
final class OpenTelemetryTracerTest {
  private static final String TRACE = "0af7651916cd43dd8448eb211c80319c";
  private static final String PARENT = "b7ad6b7169203331";

  @Test
  void spanOfAHandlerBelongsToTheTraceOfItsMessage() throws Exception {
    var spans = InMemorySpanExporter.create();
    try (var provider =
            SdkTracerProvider.builder()
                .addSpanProcessor(SimpleSpanProcessor.create(spans))
                .build();
        var fake = new FakeProxy()) {
      var traceparent = List.of("00-" + TRACE + "-" + PARENT + "-01");
      fake.publish("{}".getBytes(), "task", Map.of("Traceparent", traceparent));
      fake.publish("{}");
      var tracer = new OpenTelemetryTracer(provider.get("test"));
      fake.run(
          Worker.builder(fake.client(), "TASKS", "batch-worker")
              .concurrency(1)
              .tracer(tracer)
              .build(
                  message -> {
                    assertTrue(Span.current().getSpanContext().isValid());
                    if (message.streamSequence() == 2) throw new Term("no use");
                  }));
      var span = spans.getFinishedSpanItems().get(0);
      assertEquals("process TASKS", span.getName());
      assertEquals(SpanKind.CONSUMER, span.getKind());
      assertEquals(TRACE, span.getTraceId());
      assertEquals(PARENT, span.getParentSpanId());
      assertEquals("fetchproxy", attribute(span.getAttributes().asMap(), "messaging.system"));
      assertEquals("1", attribute(span.getAttributes().asMap(), "messaging.message.id"));
      var second = spans.getFinishedSpanItems().get(1);
      assertEquals(StatusCode.ERROR, second.getStatus().getStatusCode());
      assertEquals("0000000000000000", second.getParentSpanId());
    }
  }

  private static Object attribute(Map<AttributeKey<?>, Object> attributes, String name) {
    return attributes.get(AttributeKey.stringKey(name));
  }
}
