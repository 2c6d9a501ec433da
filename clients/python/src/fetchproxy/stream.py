"""One stream of Consume: its frames down and up, and the messages that it carries."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Protocol, cast

import grpc

from fetchproxy.backoff import Backoff
from fetchproxy.channel import Channel
from fetchproxy.contract import MOST_FRAME_BYTES, MOST_SETTLEMENTS, duration
from fetchproxy.errors import FetchProxyError, of_call, of_part, part_is_repeatable, seconds
from fetchproxy.handling import Handling
from fetchproxy.lease import Lease
from fetchproxy.options import Options
from fetchproxy.v1 import fetch_pb2 as pb

# A stream without a frame for so many heartbeats is dead. So is a worker.
_MISSED_BEATS = 3


class Owner(Protocol):
    """What a stream needs of the loop that opens it."""

    channel: Channel
    options: Options
    handling: Handling
    stop: asyncio.Event
    beat: float
    held: set[Held]
    current: Stream

    def credit(self, stream: Stream) -> int:
        """How many leases the stream may hold."""

    def credit_changed(self) -> None:
        """The open stream may hold more or fewer leases."""

    def expire(self) -> None:
        """Loses the messages whose leases have ended, now and later."""

    def start(self, credit: int) -> pb.ConsumeStart:
        """The first frame."""

    def failed(self, error: FetchProxyError, backoff: Backoff) -> float:
        """Tells of a repeat, and gives the wait before it."""


class Held(Lease):
    """A message in hand. `number` is its name on the stream; 0: it came by an earlier stream."""

    def __init__(self, source: pb.Delivery | pb.Rejected, until: float, stream: Stream) -> None:
        """It came by this stream."""
        super().__init__(source, until)
        self.stream = stream
        self.number = source.number
        #: The end of the lease by the loop's clock. Infinite: the proxy keeps it with the stream.
        self.ends = math.inf

    def decided(self) -> None:
        """Puts it into the next frame."""
        self.send()

    def send(self) -> None:
        """Puts its settlement, or an Extend, into the next frame."""
        if not self.gone:
            self.stream.ready[self] = None
            self.stream.wake.set()

    def leave(self) -> None:
        """It is over on its stream, too."""
        super().leave()
        self.stream.forget(self)

    def settlement(self, extension: float) -> pb.Settlement:
        """The outcome. Without one, an Extend by so many seconds."""
        settlement = pb.Settlement()
        if self.number:
            settlement.number = self.number
        else:
            settlement.token = self.token
        if self.outcome:
            self.outcome.put(settlement)
        else:
            settlement.extend.lease.CopyFrom(duration(extension))
        return settlement


class Stream:
    """One call of Consume. One task reads, another writes."""

    def __init__(self, owner: Owner) -> None:
        """Opens nothing yet."""
        self._owner = owner
        self.wake = asyncio.Event()  # There is something to write.
        self.leaves = asyncio.Event()  # It drains, or has ended.
        self.opened = self.ended = False
        self.error: FetchProxyError | None = None  # Why it has ended. None: an orderly end.
        self.ready: dict[Held, None] = {}  # To be settled or extended in the next frame.
        self._numbers: dict[int, Held] = {}
        # Frames without a result yet, by their ids: when each was sent, and with which messages.
        self._sent: dict[int, tuple[float, list[Held]]] = {}
        self._last_id = 0
        self._credit = 0  # As told to the proxy.
        self._credit_id = 0
        self._pause_id = 0  # The credit of a stop. 0: there is none yet.
        self._paused = False  # No message comes any more.
        self._backoff = Backoff()
        self._heard = 0.0

    async def run(self) -> None:
        """Ends with the stream. What is left in hand is then on the next stream."""
        reader = asyncio.ensure_future(self._read())
        stopper = asyncio.ensure_future(self._on_stop(reader))
        try:
            await reader
        except FetchProxyError as error:
            self.error = error
        except asyncio.CancelledError:
            if not self._owner.stop.is_set() or not reader.cancelled():
                raise  # And not by `_on_stop`, before the proxy served it.
        finally:
            reader.cancel()
            stopper.cancel()
            self._hand_over()

    async def _on_stop(self, reader: asyncio.Future[None]) -> None:
        await self._owner.stop.wait()
        if not self.opened and not self._owner.held:
            reader.cancel()
        self._owner.expire()
        self.wake.set()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        call = self._owner.channel.consume()
        silence = _MISSED_BEATS * self._owner.beat
        is_silent = False
        watching: asyncio.TimerHandle

        def watch() -> None:
            nonlocal is_silent, watching
            left = self._heard + silence - loop.time()
            is_silent = left <= 0
            if is_silent:
                call.cancel()
            else:
                watching = loop.call_later(left, watch)

        self._heard = loop.time()
        watching = loop.call_later(silence, watch)
        writer = asyncio.create_task(self._write(call))
        try:
            while (frame := await call.read()) is not grpc.aio.EOF:
                self._heard = loop.time()
                self._take(cast(pb.ConsumeResponse, frame))
            if is_silent:
                raise _silent(silence)
        except grpc.aio.AioRpcError as error:
            raise of_call(error) from None
        except asyncio.CancelledError:
            if is_silent:
                raise _silent(silence) from None
            raise
        finally:
            watching.cancel()
            writer.cancel()
            call.cancel()

    async def _write(
        self, call: grpc.aio.StreamStreamCall[pb.ConsumeRequest, pb.ConsumeResponse]
    ) -> None:
        """Sends a frame when there is something to say, and with each heartbeat."""
        loop, beat = asyncio.get_running_loop(), self._owner.beat
        # The reader has the reason of an error.
        with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            self._credit = self._owner.credit(self)
            frame = self._frame()
            frame.start.CopyFrom(self._owner.start(self._credit))
            await call.write(frame)
            next_beat = loop.time() + beat
            while not self._is_done():
                timer = loop.call_at(next_beat, self.wake.set)
                await self.wake.wait()
                timer.cancel()
                self.wake.clear()
                if loop.time() >= next_beat:
                    next_beat = loop.time() + beat
                    self._extend()
                await call.write(self._frame())
            await call.done_writing()

    def _frame(self) -> pb.ConsumeRequest:
        """All that is there to say: as many settlements as fit, or nothing, as a sign of life."""
        frame = pb.ConsumeRequest()
        stops = self._owner.stop.is_set() and not self._pause_id
        credit = self._owner.credit(self)
        if stops or credit != self._credit:
            self._credit, self._credit_id = credit, self._credit_id + 1
            frame.credit.CopyFrom(pb.ConsumeCredit(id=self._credit_id, max_leases=credit))
            if stops:
                self._pause_id = self._credit_id
        parts: list[Held] = []
        size = 0
        # The next Extend follows at the next heartbeat, which may be no sooner than a short grace.
        extension = max(self._owner.options.grace, _MISSED_BEATS * self._owner.beat)
        while self.ready and len(parts) < MOST_SETTLEMENTS and size < MOST_FRAME_BYTES:
            held = next(iter(self.ready))
            del self.ready[held]
            settlement = held.settlement(extension)
            size += settlement.ByteSize()
            parts.append(held)
            frame.settle.settlements.append(settlement)
        if parts:
            self._last_id += 1
            self._sent[self._last_id] = (asyncio.get_running_loop().time(), parts)
            frame.settle.id = self._last_id
        if self.ready:
            self.wake.set()
        return frame

    def _is_done(self) -> bool:
        """The worker stops, and this stream has nothing more to settle."""
        return self._paused and not self._holds()

    def _holds(self) -> list[Held]:
        return [held for held in self._owner.held if held.stream is self]

    def _extend(self) -> None:
        """Renews the leases that have outlived their stream. The proxy keeps the others."""
        now = asyncio.get_running_loop().time()
        for held in self._holds():
            if held.outcome:
                continue
            if held.until <= now:
                self._owner.handling.lose(held, "its handler has had the longest time, at_most")
            elif not held.number:
                held.send()

    def _take(self, frame: pb.ConsumeResponse) -> None:
        self.opened = True
        until = asyncio.get_running_loop().time() + self._owner.options.at_most
        for delivery in frame.messages:
            held = self._hold(Held(delivery, until, self))
            self._owner.handling.receive(held, delivery)
            if held.is_undecided:
                self._owner.handling.begin(held)
        for rejected in frame.rejected:
            outcome = self._owner.handling.reject(rejected)
            if rejected.token:
                self._hold(Held(rejected, until, self)).decide(outcome)
        for result in frame.results:
            self._settled(result)
        for ended in frame.ended:
            if lost := self._numbers.get(ended.number):
                self._owner.handling.lose(lost, f"{ended.why.reason}: {ended.why.message}")
        if frame.HasField("draining"):
            if self._owner.current is self:
                self._owner.current = Stream(self._owner)
            self.leaves.set()
        if self._pause_id and frame.credit_id == self._pause_id:
            self._paused = True
            self.wake.set()

    def _hold(self, held: Held) -> Held:
        self._owner.held.add(held)
        self._numbers[held.number] = held
        return held

    def forget(self, held: Held) -> None:
        """The message is over."""
        self._owner.held.discard(held)
        self.ready.pop(held, None)
        self._numbers.pop(held.number, None)
        self.wake.set()
        if self._owner.current is not self:
            self._owner.credit_changed()

    def _settled(self, result: pb.ConsumeResult) -> None:
        """Takes the results of one frame."""
        again: list[tuple[Held, FetchProxyError]] = []
        whole = result.error if result.HasField("error") else None
        sent_at, parts = self._sent.pop(result.id)
        for place, held in enumerate(parts):
            error = whole or result.results[place].error
            if part_is_repeatable(error):
                again.append((held, of_part(error)))
            elif error.reason:
                self._owner.handling.lose(held, f"{error.reason}: {error.message}")
            elif result.results[place].outcome == pb.OUTCOME_EXTENDED:
                held.ends = sent_at + seconds(result.results[place].lease)
            elif held.outcome:
                self._owner.handling.settled(held)
        if not again:
            self._backoff.reset()
            return
        error_of_longest = max((error for _, error in again), key=lambda e: e.retry_delay or 0)
        wait = self._owner.failed(error_of_longest, self._backoff)
        for held, _ in again:
            asyncio.get_running_loop().call_later(wait, held.send)

    def _hand_over(self) -> None:
        """What is left goes to the next stream: it is settled there by token, or extended."""
        if self._owner.current is self:
            self._owner.current = Stream(self._owner)
        for held in self._holds():
            if held.number:
                held.ends = self._heard + self._owner.options.grace
            held.stream, held.number = self._owner.current, 0
            held.send()
        self._owner.expire()
        self.ended = True
        self.leaves.set()


def _silent(length: float) -> FetchProxyError:
    """The error of a stream that this side gives up."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    return FetchProxyError(code.name, code, f"no frame for {length:g} s")
