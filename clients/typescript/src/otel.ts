// Spans of OpenTelemetry around handlers. The only file that needs `@opentelemetry/api`.

import {
  context,
  propagation,
  SpanKind,
  SpanStatusCode,
  trace,
  type Tracer as OtelTracer,
} from "@opentelemetry/api";

import type { Tracer } from "./held.js";
import type { Headers } from "./message.js";
import { Nak, Term } from "./outcome.js";

/**
 * For the option `tracer` of a worker: a span `process STREAM` around each handler, which is active in the handler.
 * Its parent comes from the headers of the message, by the propagator that is registered. Without a tracer of your
 * own, the registered provider makes one.
 */
export function openTelemetry(tracer: OtelTracer = trace.getTracer("fetchproxy")): Tracer {
  return {
    async trace(message, { stream, consumer }, handle) {
      const parent = propagation.extract(context.active(), message.headers, GETTER);
      const attributes = {
        "messaging.system": "fetchproxy",
        "messaging.operation.type": "process",
        "messaging.destination.name": stream,
        "messaging.consumer.group.name": consumer,
        "messaging.message.id": String(message.streamSequence),
      };
      const options = { kind: SpanKind.CONSUMER, attributes };
      const span = tracer.startSpan(`process ${stream}`, options, parent);
      try {
        const result = await context.with(trace.setSpan(parent, span), handle);
        if (result instanceof Nak || result instanceof Term) fail(result);
        return result;
      } catch (error) {
        fail(error);
        throw error;
      } finally {
        span.end();
      }

      function fail(error: unknown): void {
        const told = error instanceof Error ? error : new Error(String(error));
        if (!(error instanceof Nak || error instanceof Term)) span.recordException(told);
        span.setAttribute("error.type", told.name);
        span.setStatus({ code: SpanStatusCode.ERROR, message: told.message });
      }
    },
  };
}

const GETTER = {
  keys: (headers: Headers) => [...headers.keys()],
  get(headers: Headers, key: string): string | undefined {
    const name = [...headers.keys()].find((one) => one.toLowerCase() === key);
    return name === undefined ? undefined : headers.get(name)?.[0];
  },
};
