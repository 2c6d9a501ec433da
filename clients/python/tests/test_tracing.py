"""Spans of OpenTelemetry: of asyncio handlers and of those in threads."""

from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support import in_time, worker

from fetchproxy import Message, Nak
from fetchproxy.testing import FakeProxy

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.mark.parametrize("in_thread", [False, True])
@in_time
async def test_span_is_a_child_of_that_of_the_publisher(in_thread: bool) -> None:
    current: list[int] = []

    def note(_: Message[Any]) -> None:
        current.append(trace.get_current_span().get_span_context().span_id)

    async def note_async(message: Message[Any]) -> None:
        note(message)

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    handle = note if in_thread else note_async
    async with FakeProxy() as fake:
        fake.publish(1, headers={"Traceparent": PARENT, "tracestate": "a=b"})
        await fake.run(worker(fake.client, handle, tracer=provider.get_tracer("test")))
    (span,) = exporter.get_finished_spans()
    assert span.name == "process TASKS"
    assert span.kind == trace.SpanKind.CONSUMER
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE
    assert span.parent.trace_state.get("a") == "b"
    assert dict(span.attributes or {}) == {
        "messaging.system": "fetchproxy",
        "messaging.operation.type": "process",
        "messaging.destination.name": "TASKS",
        "messaging.consumer.group.name": "workers",
        "messaging.message.id": "1",
    }
    context = span.get_span_context()
    assert context is not None
    assert current == [context.span_id]


@in_time
async def test_span_of_a_handler_that_fails_has_an_error() -> None:
    async def handle(message: Message[Any]) -> None:
        if message.delivery_count == 1:
            raise Nak(1)

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with FakeProxy() as fake:
        fake.publish(1)
        await fake.run(worker(fake.client, handle, tracer=provider.get_tracer("test")))
    failed, done = exporter.get_finished_spans()
    assert failed.status.status_code == trace.StatusCode.ERROR
    assert done.status.is_ok
    assert failed.parent is None
