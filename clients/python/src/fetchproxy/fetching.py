"""The loop with Fetch: a call for messages whenever a handler is free and nothing waits for it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Iterable

import grpc

from fetchproxy.backoff import Backoff
from fetchproxy.channel import Channel
from fetchproxy.contract import MAX_ANSWER, MOST_SETTLEMENTS, duration
from fetchproxy.errors import FetchProxyError, of_call
from fetchproxy.handling import Handling
from fetchproxy.keeper import FetchedLease, Keeper
from fetchproxy.options import Options
from fetchproxy.v1 import fetch_pb2 as pb
from fetchproxy.waiting import end, unless

_log = logging.getLogger("fetchproxy")

# The time in seconds between two calls if the first brings nothing at once.
_PAUSE = 0.5
# The time of a call beyond its wait, in seconds.
_MARGIN = 5.0


class FetchLoop:
    """Works until `stop` is set and every message is settled."""

    def __init__(
        self,
        channel: Channel,
        options: Options,
        codec: pb.Codec,
        handling: Handling,
        stop: asyncio.Event,
    ) -> None:
        """Makes no call yet."""
        self._channel = channel
        self._options = options
        self._codec = codec
        self._handling = handling
        self._stop = stop
        self._keeper = Keeper(channel, handling)
        self._waiting: deque[FetchedLease] = deque()
        self._running = 0
        handling.on_free(self._freed)

    @property
    def leases(self) -> Iterable[FetchedLease]:
        """The messages in hand."""
        return list(self._keeper.leases)

    async def run(self) -> None:
        """Fails for a reason that a person must look at, when the messages in hand are settled."""
        keeper = asyncio.create_task(self._keeper.run())
        returner = asyncio.create_task(self._give_back())
        work = asyncio.create_task(self._work())
        try:
            # The keeper never ends by itself, unless it has a defect.
            await asyncio.wait({keeper, work}, return_when=asyncio.FIRST_COMPLETED)
            (work if work.done() else keeper).result()
        finally:
            for task in (work, returner, keeper):
                await end(task)

    async def _work(self) -> None:
        try:
            while not self._stop.is_set():
                await unless(self._stop, self._room())
                if self._stop.is_set():
                    break
                if answer := await self._fetch():
                    self._take(answer)
        except FetchProxyError:
            await self._all_gone()
            raise
        await self._all_gone()

    async def _all_gone(self) -> None:
        while self._keeper.leases:
            self._keeper.fewer.clear()
            await self._keeper.fewer.wait()

    async def _room(self) -> None:
        """Waits until a handler is free, no message waits, and there is room for more bytes."""
        while not self._has_room():
            self._keeper.fewer.clear()
            await self._keeper.fewer.wait()

    def _has_room(self) -> bool:
        leases = self._keeper.leases
        undecided = [lease for lease in leases if lease.is_undecided]
        return (
            self._running < self._handling.places
            and not self._waiting
            and len(undecided) < self._options.batch
            and len(leases) < self._options.batch + MOST_SETTLEMENTS
            and sum(lease.size for lease in undecided) < self._options.max_bytes
        )

    async def _fetch(self) -> pb.FetchResponse | None:
        """Repeats a call until there is an answer. The repeats have one name, so they get the messages
        of an answer that was lost. None if the worker stops first."""
        options, backoff = self._options, Backoff()
        undecided = sum(1 for lease in self._keeper.leases if lease.is_undecided)
        request = pb.FetchRequest(
            stream=options.stream,
            consumer=options.consumer,
            n=max(1, options.batch - undecided),
            max_wait=duration(options.max_wait),
            max_bytes=min(options.max_bytes, MAX_ANSWER),
            codec=self._codec,
            attempt_id=str(uuid.uuid4()),
            worker=options.name,
        )
        if options.lease is not None:
            request.lease.CopyFrom(duration(options.lease))
        soon = asyncio.get_running_loop().time() + _PAUSE
        while not self._stop.is_set():
            try:
                answer = await unless(self._stop, self._call(request))
            except grpc.aio.AioRpcError as failure:
                error = of_call(failure)
                if not error.is_repeatable:
                    raise error from None
                request.attempt_again = True
                wait = backoff.next(error.retry_delay)
                self._handling.retry(error, wait)
                await unless(self._stop, asyncio.sleep(wait))
                continue
            if answer is None:
                break
            if not answer.messages and not answer.rejected:
                wait = soon - asyncio.get_running_loop().time()
                await unless(self._stop, asyncio.sleep(wait))
            return answer
        await self._give_back_attempt(request)
        return None

    async def _call(self, request: pb.FetchRequest) -> pb.FetchResponse:
        answer: pb.FetchResponse
        answer = await self._channel.call("Fetch", request, self._options.max_wait + _MARGIN)
        return answer

    def _take(self, answer: pb.FetchResponse) -> None:
        until = asyncio.get_running_loop().time() + self._options.at_most
        for delivery in answer.messages:
            lease = FetchedLease(delivery, until, self._keeper)
            self._keeper.keep(lease)
            self._handling.receive(lease, delivery)
            if lease.is_undecided:
                self._waiting.append(lease)
        for rejected in answer.rejected:
            outcome = self._handling.reject(rejected)
            if rejected.token:
                lease = FetchedLease(rejected, until, self._keeper)
                self._keeper.keep(lease)
                lease.decide(outcome)
        if self._stop.is_set():  # It came with this answer.
            self._return_waiting()
        self._begin()

    def _begin(self) -> None:
        """Starts as many handlers as may run."""
        now = asyncio.get_running_loop().time()
        while self._waiting and self._running < self._handling.places:
            lease = self._waiting.popleft()
            if lease.is_undecided and lease.ends > now:
                self._running += 1
                self._handling.begin(lease, self._ended)

    def _ended(self) -> None:
        self._running -= 1
        self._freed()

    def _freed(self) -> None:
        """One more handler may run."""
        self._begin()
        self._keeper.fewer.set()

    async def _give_back(self) -> None:
        await self._stop.wait()
        self._return_waiting()

    def _return_waiting(self) -> None:
        """Returns at a stop all messages that are not begun, but no last attempt."""
        for lease in self._waiting:
            if not lease.is_last_attempt:
                self._handling.give_back(lease)

    async def _give_back_attempt(self, request: pb.FetchRequest) -> None:
        """Returns the messages of a Fetch whose answer nobody reads. If that fails, they come back when
        their leases end."""
        names = {"stream": request.stream, "consumer": request.consumer}
        give_back = pb.GiveBackRequest(attempt_id=request.attempt_id, **names)
        try:
            await self._channel.call("GiveBack", give_back, 1)
        except grpc.aio.AioRpcError as failure:
            _log.warning("the last Fetch is not given back: %s", of_call(failure))
