"""The worker: its options, its start, and the ways in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from fetchproxy.client import Client
from fetchproxy.consume import ConsumeLoop
from fetchproxy.contract import MAX_ANSWER
from fetchproxy.decode import Decode, decoder
from fetchproxy.events import Event, Ready, Stopped, log_event
from fetchproxy.fetching import FetchLoop
from fetchproxy.handling import Handling
from fetchproxy.message import Message
from fetchproxy.options import Options
from fetchproxy.tracing import Tracing
from fetchproxy.waiting import end

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

T = TypeVar("T")

# How long the settlements of a hurried stop may take, in seconds.
_LAST_SETTLEMENTS: Final = 5.0


class Worker(Generic[T]):
    """Runs a handler for each message of a consumer, and settles the message by what becomes of it."""

    def __init__(
        self,
        client: Client,
        stream: str,
        consumer: str,
        handler: Callable[[Message[T]], Any],
        *,
        concurrency: int = 16,
        mode: Literal["consume", "fetch"] = "consume",
        batch: int | None = None,
        max_wait: float = 10.0,
        lease: float | None = None,
        grace: float = 10.0,
        max_bytes: int = MAX_ANSWER,
        at_most: float = 3600.0,
        decode: Decode[T] = "json",
        stop_timeout: float | None = None,
        on_event: Callable[[Event], None] = log_event,
        name: str = "fetch-proxy python",
        tracer: Tracer | None = None,
    ) -> None:
        """docs/reference/client-packages.md explains the options. A handler that is no coroutine runs
        in a thread. A wrong option is a ValueError or a TypeError."""
        self._options: Final = Options(
            stream=stream,
            consumer=consumer,
            concurrency=concurrency,
            mode=mode,
            batch=concurrency if batch is None else batch,
            max_wait=max_wait,
            lease=lease,
            grace=grace,
            max_bytes=max_bytes,
            at_most=at_most,
            stop_timeout=stop_timeout,
            name=name,
        )
        if not callable(handler):
            raise TypeError("handler is not a function")
        self._client: Final = client
        self._handler: Final = handler
        self._decode, self._codec = decoder(decode)
        self._on_event: Final = on_event
        self._tracing: Final = Tracing(tracer, stream, consumer)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def main(self) -> None:
        """Runs until SIGTERM or SIGINT, then closes the client. It is the whole of a program."""

        async def run() -> None:
            async with self._client:
                await self.run(signals=True)

        asyncio.run(run())

    def stop(self) -> None:
        """Ends `run` when the handlers that run have ended. A second call gives their messages back.
        May be called from any thread."""
        if self._loop is None:
            self._note_stop()
        else:
            with contextlib.suppress(RuntimeError):  # The loop has ended already.
                self._loop.call_soon_threadsafe(self._note_stop)

    async def run(self, *, signals: bool = False) -> None:
        """Works until `stop`, or with `signals` until SIGTERM or SIGINT. May be called once. Raises a
        FetchProxyError that a person must look at."""
        if self._loop is not None:
            raise RuntimeError("a worker runs once: make another one")
        self._loop = asyncio.get_running_loop()
        options = self._options
        handling = Handling(
            self._handler, self._decode, options.concurrency, self._tracing, self._on_event
        )
        kind = ConsumeLoop if options.mode == "consume" else FetchLoop
        loop = kind(self._client.channel, options, self._codec, handling, self._stop)
        with self._signals() if signals else contextlib.nullcontext():
            handling.tell(Ready())
            work = asyncio.ensure_future(loop.run())
            hurry = asyncio.ensure_future(self._hurried())
            try:
                await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    for lease in loop.leases:
                        handling.give_back(lease)
                    await asyncio.wait({work}, timeout=_LAST_SETTLEMENTS)
                    for lease in loop.leases:
                        handling.lose(lease, "the worker stops before the proxy has confirmed it")
                if work.cancelled():  # Not by this function, and no call is cancelled otherwise.
                    raise RuntimeError("the client was closed while the worker ran")
                if work.done():
                    work.result()
            finally:
                await end(hurry)
                await end(work)
                await handling.end()
            handling.tell(Stopped())

    def _note_stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _hurried(self) -> None:
        """Returns at the second stop, or at the end of the time after the first."""
        await self._stop.wait()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._options.stop_timeout)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are a stop, and then what they were."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, lambda *_: self.stop()) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
