"""A worker runs handlers at once, cancels them, and stops: with Consume and with Fetch."""

import asyncio
import threading
from typing import Any

import pytest
from support import Events, both_modes, in_time, worker

from fetchproxy import (
    Client,
    FetchProxyError,
    HandlerError,
    Lost,
    Message,
    Retry,
    Returned,
)
from fetchproxy.fetching import FetchLoop
from fetchproxy.handling import Handling
from fetchproxy.outcome import RETURN
from fetchproxy.testing import FakeProxy, Settled
from fetchproxy.tracing import Tracing
from fetchproxy.v1 import fetch_pb2 as pb


class Crowd:
    """A handler that counts how many of it run at once, and waits for the word to end."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.begun = asyncio.Event()
        self.cancelled: list[int] = []
        self.may_end = asyncio.Event()

    async def __call__(self, message: Message[Any]) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.append(message.delivery_count)
            raise
        finally:
            self.now -= 1


@both_modes
@pytest.mark.parametrize("concurrency", [1, 4])
@in_time
async def test_as_many_handlers_run_at_once_as_wanted(mode: str, concurrency: int) -> None:
    handle = Crowd()
    async with FakeProxy() as fake:
        for number in range(10):
            fake.publish(number)
        one = worker(fake.client, handle, mode=mode, concurrency=concurrency)
        running = asyncio.ensure_future(fake.run(one))
        while handle.now < concurrency:
            await asyncio.sleep(0.01)
        handle.may_end.set()
        await running
    assert handle.most == concurrency
    assert all(record.settlements[0].action == "ack" for record in fake.messages)


@both_modes
@in_time
async def test_handler_is_cancelled_when_its_lease_is_lost(mode: str) -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy(ack_wait=2) as fake:
        record = fake.publish({})
        running = asyncio.ensure_future(
            fake.run(worker(fake.client, handle, mode=mode, on_event=events))
        )
        await handle.begun.wait()
        fake.expire(record)
        await events.until(Lost)
        handle.may_end.set()
        await running
    assert handle.cancelled == [1]
    assert record.settlements == [Settled("ack", attempt=2)]
    assert events.attempts() == [("lost", 1), ("acked", 2)]


@both_modes
@in_time
async def test_outcome_of_a_lost_message_is_dropped(mode: str) -> None:
    begun, lost = asyncio.Event(), asyncio.Event()

    async def handle(message: Message[Any]) -> None:
        if message.delivery_count > 1:
            await lost.wait()
            return
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return  # As if it had succeeded.

    events = Events()
    async with FakeProxy(ack_wait=2) as fake:
        record = fake.publish({})
        running = asyncio.ensure_future(
            fake.run(worker(fake.client, handle, mode=mode, on_event=events))
        )
        await begun.wait()
        fake.expire(record)
        await events.until(Lost)
        lost.set()
        await running
    assert record.settlements == [Settled("ack", attempt=2)]
    assert events.attempts() == [("lost", 1), ("acked", 2)]


@both_modes
@in_time
async def test_handler_that_hangs_loses_its_message_after_the_longest_time(mode: str) -> None:
    async def handle(message: Message[Any]) -> None:
        if message.delivery_count == 1:
            await asyncio.Event().wait()

    events = Events()
    async with FakeProxy(ack_wait=1) as fake:
        record = fake.publish({})
        await fake.run(worker(fake.client, handle, mode=mode, at_most=1, on_event=events))
    assert record.settlements == [Settled("ack", attempt=2)]
    assert events.attempts() == [("lost", 1), ("acked", 2)]


@both_modes
@in_time
async def test_lease_is_kept_while_the_handler_runs(mode: str) -> None:
    async def handle(_: Message[Any]) -> None:
        await asyncio.sleep(2.5)

    async with FakeProxy(ack_wait=1) as fake:
        record = fake.publish({})
        await fake.run(worker(fake.client, handle, mode=mode))
    assert record.settlements == [Settled("ack", attempt=1)]


@both_modes
@in_time
async def test_stop_waits_for_the_handlers_that_run(mode: str) -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        first = fake.publish(1)
        one = worker(fake.client, handle, mode=mode, concurrency=1, on_event=events)
        running = asyncio.ensure_future(one.run())
        await handle.begun.wait()
        later = fake.publish(2)
        one.stop()
        handle.may_end.set()
        await running
    assert first.settlements == [Settled("ack", attempt=1)]
    assert later.settlements == []
    assert events.names == ["ready", "acked", "stopped"]


@in_time
async def test_messages_that_wait_go_back_at_a_stop() -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        records = [fake.publish(number) for number in range(3)]
        one = worker(fake.client, handle, mode="fetch", concurrency=1, batch=3, on_event=events)
        running = asyncio.ensure_future(one.run())
        await handle.begun.wait()
        one.stop()
        await events.until(Returned, 2)
        assert not handle.may_end.is_set()
        handle.may_end.set()
        await running
    kinds = [record.settlements[0].action for record in records]
    assert kinds == ["ack", "nak", "nak"]


@pytest.mark.parametrize(("max_deliver", "begun"), [(0, 0), (1, 1)])
@in_time
async def test_answer_that_comes_with_the_stop_goes_back(max_deliver: int, begun: int) -> None:
    handle, stop = Crowd(), asyncio.Event()
    handling = Handling(handle, bytes, 1, Tracing(None, "TASKS", "workers"), Events())
    async with FakeProxy() as fake:
        one = worker(fake.client, handle, mode="fetch", concurrency=1, batch=3)
        options, channel = one._options, fake.client.channel
        loop = FetchLoop(channel, options, pb.CODEC_RAW, handling, stop)
        stop.set()
        delivery = pb.Delivery(token="token", max_deliver=max_deliver, delivery_count=1)
        delivery.lease.seconds = 30
        loop._take(pb.FetchResponse(messages=[delivery]))
        (lease,) = loop.leases
        await asyncio.sleep(0)
        assert (lease.outcome is RETURN, handle.now) == (not begun, begun)
        await handling.end()


@in_time
async def test_message_that_waits_on_its_last_attempt_is_handled_at_a_stop() -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy(max_deliver=1) as fake:
        records = [fake.publish(number) for number in range(3)]
        one = worker(fake.client, handle, mode="fetch", concurrency=1, batch=3, on_event=events)
        running = asyncio.ensure_future(one.run())
        await handle.begun.wait()
        one.stop()
        handle.may_end.set()
        await running
    assert [record.settlements for record in records] == [[Settled("ack", attempt=1)]] * 3


@both_modes
@in_time
async def test_second_stop_gives_the_messages_back(mode: str) -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        record = fake.publish({})
        # With one handler, no Fetch waits that could take the message again.
        one = worker(fake.client, handle, mode=mode, concurrency=1, on_event=events)
        running = asyncio.ensure_future(one.run())
        await handle.begun.wait()
        one.stop()
        one.stop()
        await running
    assert handle.cancelled == [1]
    assert record.settlements == [Settled("nak", attempt=1)]
    assert events.names == ["ready", "returned", "stopped"]


@both_modes
@in_time
async def test_end_of_the_stop_timeout_gives_the_messages_back(mode: str) -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        record = fake.publish({})
        options = {"concurrency": 1, "stop_timeout": 0.1}
        one = worker(fake.client, handle, mode=mode, on_event=events, **options)
        running = asyncio.ensure_future(one.run())
        await handle.begun.wait()
        one.stop()
        await running
    assert record.settlements == [Settled("nak", attempt=1)]
    assert events.names == ["ready", "returned", "stopped"]


@both_modes
@in_time
async def test_second_stop_does_not_nak_a_last_attempt(mode: str) -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy(max_deliver=1) as fake:
        record = fake.publish({})
        one = worker(fake.client, handle, mode=mode, on_event=events)
        running = asyncio.ensure_future(one.run())
        await handle.begun.wait()
        one.stop()
        one.stop()
        await running
    assert record.settlements == []
    assert events.names == ["ready", "lost", "stopped"]


@both_modes
@in_time
async def test_function_that_is_no_coroutine_runs_in_a_thread(mode: str) -> None:
    threads: set[str] = set()
    meet = threading.Barrier(3, timeout=10)

    def handle(_: Message[Any]) -> None:
        threads.add(threading.current_thread().name)
        meet.wait()  # Only if three run at once.

    async with FakeProxy() as fake:
        for number in range(3):
            fake.publish(number)
        await fake.run(worker(fake.client, handle, mode=mode, concurrency=3))
    assert threads == {"fetchproxy-handler"}


@both_modes
@in_time
async def test_thread_that_cannot_be_cancelled_keeps_its_place(mode: str) -> None:
    may_end, begun = threading.Event(), threading.Event()
    order: list[tuple[int, bool]] = []

    def handle(message: Message[Any]) -> None:
        if not begun.is_set():
            begun.set()
            may_end.wait(10)
        order.append((message.delivery_count, message.cancelled.is_set()))

    events = Events()
    async with FakeProxy(ack_wait=2) as fake:
        record = fake.publish({})
        one = worker(fake.client, handle, mode=mode, concurrency=1, on_event=events)
        running = asyncio.ensure_future(fake.run(one))
        await asyncio.to_thread(begun.wait, 10)
        fake.expire(record)
        await events.until(Lost)
        await asyncio.sleep(0.1)
        assert order == []
        # A stream may have brought the message before it could say so.
        assert mode == "consume" or record.attempts == 1
        may_end.set()
        await running
    assert order == [(1, True), (2, False)] or order == [(1, True), (3, False)]
    assert record.settlements[-1].action == "ack"


@both_modes
@in_time
async def test_error_of_on_event_does_not_reach_the_worker(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("no disk")

    async def handle(_: Message[Any]) -> None:
        pass

    async with FakeProxy() as fake:
        record = fake.publish({})
        await fake.run(worker(fake.client, handle, mode=mode, on_event=fails))
    assert record.settlements == [Settled("ack", attempt=1)]
    assert "on_event failed at acked" in caplog.text


@both_modes
@in_time
async def test_call_that_fails_is_repeated(mode: str) -> None:
    async def handle(_: Message[Any]) -> None:
        pass

    events = Events()
    async with FakeProxy() as fake:
        record = fake.publish({})
        method = "Consume" if mode == "consume" else "Fetch"
        fake.fail(method, "NATS_UNAVAILABLE")
        fake.fail(method, "DRAINING")
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    assert record.settlements == [Settled("ack", attempt=1)]
    assert [event.reason for event in events.of(Retry)] == ["NATS_UNAVAILABLE", "DRAINING"]


@in_time
async def test_handler_continues_when_its_stream_breaks() -> None:
    """Its lease is extended on the next stream, and its message counts there."""
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        records = [fake.publish(number) for number in range(2)]
        one = worker(fake.client, handle, concurrency=1, grace=3.0, on_event=events)
        running = asyncio.ensure_future(fake.run(one))
        await handle.begun.wait()
        fake.cut()
        await events.until(Retry)
        await asyncio.sleep(3.5)  # More than a lease that is extended once.
        assert [record.attempts for record in records] == [1, 0]
        handle.may_end.set()
        await running
    assert [record.settlements for record in records] == [[Settled("ack", attempt=1)]] * 2
    assert handle.most == 1


@pytest.mark.parametrize("decided", [False, True])
@in_time
async def test_lease_ends_without_a_proxy(decided: bool) -> None:
    """A handler is cancelled. An outcome is given up when the worker stops."""
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        fake.publish({})
        client = Client(fake.address)
        one = worker(client, handle, on_event=events)
        running = asyncio.ensure_future(one.run())
        await handle.begun.wait()
    if decided:
        handle.may_end.set()
        one.stop()
    await events.until(Lost)
    assert handle.cancelled == ([] if decided else [1])
    one.stop()
    await running
    assert events.names[-1] == "stopped"
    await client.close()


@both_modes
@in_time
async def test_closed_client_ends_the_worker(mode: str) -> None:
    async with FakeProxy() as fake:
        client = Client(fake.address)
        one = worker(client, Crowd(), mode=mode)
        running = asyncio.ensure_future(one.run())
        while not fake.requests:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(RuntimeError, match="the client was closed"):
            await running


@in_time
async def test_fetch_of_a_worker_whose_answer_is_lost_is_repeated() -> None:
    async def handle(_: Message[Any]) -> None:
        pass

    async with FakeProxy() as fake:
        record = fake.publish({})
        fake.lose_answer("Fetch")
        fake.lose_answer("Settle")
        await fake.run(worker(fake.client, handle, mode="fetch"))
    assert record.settlements == [Settled("ack", attempt=1)]
    fetches = [request for request in fake.requests if isinstance(request, pb.FetchRequest)]
    assert [fetch.attempt_again for fetch in fetches[:2]] == [False, True]


@both_modes
@in_time
async def test_refusal_ends_the_worker(mode: str) -> None:
    async def handle(_: Message[Any]) -> None:
        pass

    events = Events()
    async with FakeProxy() as fake:
        fake.fail("Consume" if mode == "consume" else "Fetch", "NOT_ALLOWED")
        with pytest.raises(FetchProxyError) as failure:
            await worker(fake.client, handle, mode=mode, on_event=events).run()
    assert failure.value.reason == "NOT_ALLOWED"
    assert events.names == ["ready"]


@both_modes
@in_time
async def test_handler_whose_own_task_was_cancelled_has_failed(mode: str) -> None:
    async def handle(message: Message[Any]) -> None:
        if message.delivery_count == 1:
            task = asyncio.ensure_future(asyncio.sleep(60))
            task.cancel()
            await task

    events = Events()
    async with FakeProxy() as fake:
        fake.publish({})
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    assert len(events.of(HandlerError)) == 1
    assert events.attempts()[1:] == [("nacked", 1), ("acked", 2)]


@both_modes
@in_time
async def test_cancelled_run_cancels_its_handlers(mode: str) -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        fake.publish({})
        running = asyncio.ensure_future(
            worker(fake.client, handle, mode=mode, on_event=events).run()
        )
        await handle.begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert handle.cancelled == [1]
    assert events.names == ["ready"]


@both_modes
@in_time
async def test_settlement_that_fails_is_repeated(mode: str) -> None:
    handle, events = Crowd(), Events()
    async with FakeProxy() as fake:
        record = fake.publish({})
        fake.fail_settlement("SETTLE_UNCONFIRMED")
        fake.fail_settlement("LEASE_BUSY")
        handle.may_end.set()
        await fake.run(worker(fake.client, handle, mode=mode, on_event=events))
    assert record.settlements == [Settled("ack", attempt=1)]
    assert [event.reason for event in events.of(Retry)] == ["SETTLE_UNCONFIRMED", "LEASE_BUSY"]
