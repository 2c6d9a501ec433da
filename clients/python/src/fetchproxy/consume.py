"""The loop with Consume: streams follow each other, and share the messages in hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

import grpc

from fetchproxy.backoff import Backoff
from fetchproxy.channel import Channel
from fetchproxy.contract import MAX_ANSWER, SHORTEST, duration
from fetchproxy.errors import FetchProxyError
from fetchproxy.handling import Handling
from fetchproxy.options import Options
from fetchproxy.stream import Held, Stream
from fetchproxy.v1 import fetch_pb2 as pb
from fetchproxy.waiting import end, unless


class ConsumeLoop:
    """Works until `stop` is set and every message is settled."""

    def __init__(
        self,
        channel: Channel,
        options: Options,
        codec: pb.Codec,
        handling: Handling,
        stop: asyncio.Event,
    ) -> None:
        """Opens no stream yet."""
        self.channel = channel
        self.options = options
        self.codec = codec
        self.handling = handling
        self.stop = stop
        self.beat = max(options.grace / 3, SHORTEST)
        self.held: set[Held] = set()
        self.current = Stream(self)
        self._timer: asyncio.TimerHandle | None = None
        handling.on_free(self.credit_changed)

    @property
    def leases(self) -> Iterable[Held]:
        """The messages in hand."""
        return list(self.held)

    async def run(self) -> None:
        """Fails for a reason that a person must look at."""
        backoff = Backoff()
        streams: set[asyncio.Task[None]] = set()
        try:
            while True:
                stream = self.current
                streams.add(asyncio.create_task(stream.run()))
                await stream.leaves.wait()
                if not stream.ended:  # It drains. The next stream takes over; this ends by itself.
                    continue
                if self.stop.is_set():
                    await asyncio.wait(streams)
                for task in [task for task in streams if task.done()]:
                    task.result()
                    streams.remove(task)
                if self.stop.is_set() and not self.held:
                    return
                await self._after(stream, backoff)
        finally:
            if self._timer:
                self._timer.cancel()
            for task in streams:
                await end(task)

    async def _after(self, stream: Stream, backoff: Backoff) -> None:
        """Waits until the next stream may be opened."""
        error = stream.error
        if stream.opened:
            backoff.reset()
        if error is None:
            return
        if stream.opened and error.code == grpc.StatusCode.UNAUTHENTICATED:
            return  # The file may have a newer credential.
        if not error.is_repeatable:
            for held in self.leases:
                self.handling.lose(held, str(error))
            raise error
        wait = backoff.next(error.retry_delay)
        self.handling.retry(error, wait)
        if self.stop.is_set():
            await asyncio.sleep(wait)
        else:
            await unless(self.stop, asyncio.sleep(wait))

    def credit(self, stream: Stream) -> int:
        """How many leases a stream may hold: messages of earlier streams count, too."""
        if self.stop.is_set():
            return 0
        earlier = sum(1 for held in self.held if held.stream is not stream or not held.number)
        return max(0, self.handling.places - earlier)

    def credit_changed(self) -> None:
        """A thread that was stuck has ended, or a message of an earlier stream."""
        self.current.wake.set()

    def expire(self) -> None:
        """Loses the messages whose leases have ended because no stream has reached the proxy. A message
        with an outcome is tried again while the worker runs: its settlement may have arrived."""
        loop = asyncio.get_running_loop()
        stops = self.stop.is_set()
        ending = [held for held in self.leases if stops or held.outcome is None]
        for held in ending:
            if held.ends <= loop.time():
                self.handling.lose(held, "no stream has reached the proxy while the lease lasted")
        if self._timer:
            self._timer.cancel()
        if (
            first := min((held.ends for held in ending if not held.gone), default=math.inf)
        ) < math.inf:
            self._timer = loop.call_at(first, self.expire)

    def start(self, credit: int) -> pb.ConsumeStart:
        """The first frame of a stream."""
        options = self.options
        keep = pb.ConsumeKeep(grace=duration(options.grace), at_most=duration(options.at_most))
        return pb.ConsumeStart(
            stream=options.stream,
            consumer=options.consumer,
            credit=pb.ConsumeCredit(max_leases=credit, max_bytes=options.max_bytes),
            keep=keep,
            codec=self.codec,
            max_frame_bytes=min(options.max_bytes, MAX_ANSWER),
            heartbeat=duration(self.beat),
            worker=options.name,
        )

    def failed(self, error: FetchProxyError, backoff: Backoff) -> float:
        """Tells that settlements are repeated, and after how long."""
        wait = backoff.next(error.retry_delay)
        self.handling.retry(error, wait)
        return wait
