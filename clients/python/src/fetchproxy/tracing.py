"""A span of OpenTelemetry around each handler. Imports OpenTelemetry only if there is a tracer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from fetchproxy.message import Message

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_PARENT = ("traceparent", "tracestate")


class Tracing:
    """Makes the span of a message."""

    def __init__(self, tracer: Tracer | None, stream: str, consumer: str) -> None:
        """Without a tracer, there are no spans."""
        self._tracer = tracer
        self._name = f"process {stream}"
        self._attributes = {
            "messaging.system": "fetchproxy",
            "messaging.operation.type": "process",
            "messaging.destination.name": stream,
            "messaging.consumer.group.name": consumer,
        }

    def span(self, message: Message[Any]) -> AbstractContextManager[object]:
        """The span within which the handler runs, as a child of that of the publisher."""
        if self._tracer is None:
            return nullcontext()
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        lower = {name.lower(): values for name, values in message.headers.items()}
        carrier = {name: lower[name][0] for name in _PARENT if lower.get(name)}
        return self._tracer.start_as_current_span(
            self._name,
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.CONSUMER,
            attributes={**self._attributes, "messaging.message.id": str(message.stream_sequence)},
        )
