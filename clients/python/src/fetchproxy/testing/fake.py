"""The fake proxy as a test uses it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc
from google.protobuf.message import Message as Protobuf

from fetchproxy.client import Client
from fetchproxy.errors import REASONS
from fetchproxy.testing.queue import Queue, Record
from fetchproxy.testing.service import Service
from fetchproxy.worker import Worker


class FakeProxy:
    """A proxy in memory with one stream and one consumer, whatever the worker calls them. Use it as
    `async with FakeProxy() as fake`. It listens on a free port of this machine."""

    def __init__(self, *, max_deliver: int = 0, ack_wait: float = 30.0) -> None:
        """`max_deliver` 0 is no limit. `ack_wait` is in seconds: a lease of a fetch lasts as long."""
        self._queue: Final = Queue(max_deliver, ack_wait)
        self._service: Final = Service(self._queue)
        self._server: grpc.aio.Server | None = None
        self._client: Client | None = None

    async def __aenter__(self) -> FakeProxy:
        """Begins to serve."""
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self._service.handler(),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._client = Client(self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends all calls."""
        self._service.close()
        if self._client:
            await self._client.close()
        if self._server:
            await self._server.stop(None)

    @property
    def client(self) -> Client:
        """A client of the fake."""
        if self._client is None:
            raise RuntimeError("use it as `async with FakeProxy() as fake`")
        return self._client

    @property
    def messages(self) -> Sequence[Record]:
        """All messages, in the order of the stream."""
        return self._queue.records

    @property
    def requests(self) -> Sequence[Protobuf]:
        """All requests and frames of clients, in order."""
        return self._service.requests

    def publish(
        self,
        payload: object,
        subject: str = "tasks",
        headers: Mapping[str, str | Sequence[str]] | None = None,
    ) -> Record:
        """Adds a message. The payload is bytes, text, or anything that JSON can say."""
        if isinstance(payload, str):
            payload = payload.encode()
        elif not isinstance(payload, bytes):
            payload = json.dumps(payload).encode()
        values = {
            name: [value] if isinstance(value, str) else list(value)
            for name, value in (headers or {}).items()
        }
        record = self._queue.publish(payload, subject, values)
        self._service.changed()
        return record

    def expire(self, record: Record) -> None:
        """Ends the lease of a message, as if another worker had it. It is delivered again."""
        self._queue.expire(record)
        self._service.lapse()

    def fail(self, method: str, reason: str) -> None:
        """The next call of the method fails: `fail("Fetch", "NATS_UNAVAILABLE")`."""
        if reason not in REASONS:
            raise ValueError(f"{reason} is no reason of the proxy")
        self._service.failures[method].append(reason)

    def fail_settlement(self, reason: str) -> None:
        """The next settlement fails, in whatever call it comes: `fail_settlement("LEASE_BUSY")`."""
        self.fail("settlement", reason)

    def cut(self) -> None:
        """Ends all open calls of Consume, as if a connection broke."""
        self._service.cut()

    def lose_answer(self, method: str) -> None:
        """The next call of the method is carried out, and its answer is lost."""
        self._service.losses[method] += 1

    async def settled(self, within: float = 10.0) -> None:
        """Waits until every message has ended. Takes longer than `within` seconds: TimeoutError."""
        with self._service.listening() as event:

            async def idle() -> None:
                while not self._queue.is_idle:
                    event.clear()
                    await event.wait()

            await asyncio.wait_for(idle(), within)

    async def run(self, worker: Worker[Any], within: float = 10.0) -> None:
        """Runs the worker until every message has ended, then stops it. Raises what the worker raises,
        and a TimeoutError after `within` seconds."""
        running = asyncio.ensure_future(worker.run())
        settled = asyncio.ensure_future(self.settled(within))
        try:
            await asyncio.wait({running, settled}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                settled.result()
                worker.stop()
            await running
        finally:
            for task in (settled, running):
                task.cancel()
            with contextlib.suppress(BaseException):
                await asyncio.gather(settled, running, return_exceptions=True)
