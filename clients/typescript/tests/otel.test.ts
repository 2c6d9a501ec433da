// Spans around handlers, by the SDK of OpenTelemetry.

import assert from "node:assert/strict";
import { test } from "node:test";

import { context, propagation, SpanKind, SpanStatusCode, trace } from "@opentelemetry/api";
import { AsyncLocalStorageContextManager } from "@opentelemetry/context-async-hooks";
import { W3CTraceContextPropagator } from "@opentelemetry/core";
import {
  BasicTracerProvider,
  InMemorySpanExporter,
  SimpleSpanProcessor,
} from "@opentelemetry/sdk-trace-base";
import { Nak, type Message } from "fetchproxy";
import { openTelemetry } from "fetchproxy/otel";

import { MODES, Stage } from "./stage.js";

const [TRACE, PARENT] = ["0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"];

for (const mode of MODES)
  test(`${mode}: each handler has a span, below the span of its message`, () =>
    Stage.with(async (stage) => {
      const exporter = new InMemorySpanExporter();
      const spanProcessors = [new SimpleSpanProcessor(exporter)];
      const provider = new BasicTracerProvider({ spanProcessors });
      context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable());
      propagation.setGlobalPropagator(new W3CTraceContextPropagator());
      const traced = { Traceparent: `00-${TRACE}-${PARENT}-01`, tracestate: "vendor=1" };
      stage.fake.publish(1, "tasks", traced);
      stage.fake.publish(2);
      const active: unknown[] = [];
      const handler = ({ data, deliveryCount }: Message) => {
        active.push(trace.getActiveSpan()?.spanContext().traceId);
        if (data === 2 && deliveryCount === 1) throw new Nak();
        if (data === 2 && deliveryCount === 2) throw new TypeError("broken");
      };
      const tracer = openTelemetry(provider.getTracer("test"));
      await stage.run(handler, { mode, tracer, concurrency: 1 });
      const spans = exporter.getFinishedSpans();
      assert.deepEqual(
        spans.map(({ name, kind }) => [name, kind]),
        Array(4).fill(["process TASKS", SpanKind.CONSUMER]),
      );
      assert.deepEqual(
        active,
        spans.map((span) => span.spanContext().traceId),
      );
      const first = spans.find((span) => span.attributes["messaging.message.id"] === "1")!;
      assert.equal(first.spanContext().traceId, TRACE);
      assert.equal(first.parentSpanContext?.spanId, PARENT);
      assert.equal(first.parentSpanContext?.traceState?.get("vendor"), "1");
      assert.deepEqual(first.attributes, {
        "messaging.system": "fetchproxy",
        "messaging.operation.type": "process",
        "messaging.destination.name": "TASKS",
        "messaging.consumer.group.name": "worker",
        "messaging.message.id": "1",
      });
      assert.equal(first.status.code, SpanStatusCode.UNSET);
      const others = spans.filter((span) => span !== first);
      assert.deepEqual(
        others.map(({ attributes, status }) => [attributes["error.type"], status.code]),
        [
          ["Nak", SpanStatusCode.ERROR],
          ["TypeError", SpanStatusCode.ERROR],
          [undefined, SpanStatusCode.UNSET],
        ],
      );
      assert.deepEqual(
        others.map(({ events }) => events.length),
        [0, 1, 0],
      );
      context.disable();
      propagation.disable();
    }));
