"""A handler decides how its message is settled: with Consume and with Fetch."""

from dataclasses import dataclass
from typing import Any

import pytest
from support import Events, both_modes, in_time, worker

from fetchproxy import HandlerError, Message, Nak, Rejected, Term, Termed
from fetchproxy.testing import FakeProxy, Settled


@both_modes
@in_time
async def test_message_is_acked_if_the_handler_returns(mode: str) -> None:
    seen: list[Message[Any]] = []

    async def handle(message: Message[Any]) -> None:
        seen.append(message)

    async with FakeProxy() as fake:
        record = fake.publish({"order": 7}, "orders.new", {"Colour": ["red", "green"]})
        events = Events()
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    assert record.settlements == [Settled("ack", attempt=1)]
    assert events.names == ["ready", "acked", "stopped"]
    (message,) = seen
    assert message.data == {"order": 7}
    assert message.payload == b'{"order": 7}'
    assert (message.subject, message.headers) == ("orders.new", {"Colour": ("red", "green")})
    assert (message.stream_sequence, message.delivery_count, message.max_deliver) == (1, 1, 0)
    assert message.timestamp == record.timestamp.replace(tzinfo=message.timestamp.tzinfo)


@both_modes
@pytest.mark.parametrize("by", ["raise", "return"])
@in_time
async def test_message_comes_back_after_a_nak(mode: str, by: str) -> None:
    async def handle(message: Message[Any]) -> Nak | None:
        if message.delivery_count > 2:
            return None
        if by == "raise":
            raise Nak(message.delivery_count * 1.5)
        return Nak(message.delivery_count * 1.5)

    async with FakeProxy() as fake:
        record = fake.publish({})
        events = Events()
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    assert record.settlements == [
        Settled("nak", attempt=1, delay=1.5),
        Settled("nak", attempt=2, delay=3.0),
        Settled("ack", attempt=3),
    ]
    assert events.attempts() == [("nacked", 1), ("nacked", 2), ("acked", 3)]


@both_modes
@pytest.mark.parametrize("by", ["raise", "return"])
@in_time
async def test_message_is_terminated_with_a_reason(mode: str, by: str) -> None:
    async def handle(_: Message[Any]) -> Term:
        if by == "raise":
            raise Term("no such customer")
        return Term("no such customer")

    async with FakeProxy() as fake:
        record = fake.publish({})
        events = Events()
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    assert record.settlements == [Settled("term", attempt=1, reason="no such customer")]
    assert [event.reason for event in events.of(Termed)] == ["no such customer"]


@both_modes
@in_time
async def test_error_of_the_handler_is_a_nak_whose_delay_grows(mode: str) -> None:
    async def handle(_: Message[Any]) -> None:
        raise KeyError("customer")

    async with FakeProxy(max_deliver=8) as fake:
        record = fake.publish({})
        events = Events()
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    delays = [settled.delay for settled in record.settlements]
    assert delays == [5, 10, 20, 40, 80, 160, 300, 300]
    assert {type(event.error) for event in events.of(HandlerError)} == {KeyError}
    assert record.attempts == 8


@both_modes
@in_time
async def test_handler_is_not_called_for_a_payload_that_cannot_be_decoded(mode: str) -> None:
    def decode(payload: bytes) -> int:
        return int(payload)

    seen: list[int] = []

    async def handle(message: Message[int]) -> None:
        seen.append(message.data)

    async with FakeProxy() as fake:
        wrong, right = fake.publish(b"seven"), fake.publish(b"7")
        await fake.run(worker(fake.client, handle, mode=mode, decode=decode))
    (settled,) = wrong.settlements
    assert settled.action == "term"
    assert 'cannot be decoded: ValueError("invalid literal' in settled.reason
    assert (seen, right.settlements) == ([7], [Settled("ack", attempt=1)])


@dataclass
class Order:
    number: int
    note: str = ""


@both_modes
@in_time
async def test_schema_makes_an_object_of_the_payload(mode: str) -> None:
    seen: list[Order] = []

    async def handle(message: Message[Order]) -> None:
        seen.append(message.data)

    async with FakeProxy() as fake:
        fake.publish({"number": 7, "unknown": True})
        wrong = [fake.publish({"note": "no number"}), fake.publish([7])]
        await fake.run(worker(fake.client, handle, mode=mode, decode=Order))
    assert seen == [Order(7)]
    assert [record.settlements[0].action for record in wrong] == ["term", "term"]


@both_modes
@in_time
async def test_proxy_terminates_what_is_not_json(mode: str) -> None:
    async def handle(_: Message[Any]) -> None:
        raise AssertionError("no handler gets it")

    async with FakeProxy() as fake:
        record = fake.publish("{", "orders.new")
        events = Events()
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    assert record.settlements[0].action == "term"
    (event,) = events.of(Rejected)
    assert (event.rejected.payload, event.rejected.subject) == (b"{", "orders.new")
    assert "not readable" in event.rejected.detail


@both_modes
@in_time
async def test_message_without_payload_has_no_data(mode: str) -> None:
    seen: list[object] = []

    async def handle(message: Message[Any]) -> None:
        seen.append(message.data)

    async with FakeProxy() as fake:
        fake.publish(b"", headers={"KV-Operation": "DEL"})
        await fake.run(worker(fake.client, handle, mode=mode))
    assert seen == [None]


@both_modes
@in_time
async def test_deep_json_does_not_end_the_worker(mode: str) -> None:
    def handle(_: Message[Any]) -> None:
        raise AssertionError("no handler gets it")

    async with FakeProxy() as fake:
        record = fake.publish("[" * 900 + "]" * 900)
        options: dict[str, Any] = {"mode": mode, "decode": _deep}
        await fake.run(worker(fake.client, handle, **options))
    assert "RecursionError" in record.settlements[0].reason


def _deep(payload: bytes) -> object:
    raise RecursionError(payload[:3].decode())
