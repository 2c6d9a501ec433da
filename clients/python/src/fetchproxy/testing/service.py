"""The contract of the fake: single calls, and one stream of frames for each Consume."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as Protobuf
from google.rpc import error_details_pb2, status_pb2

from fetchproxy.contract import SERVICE, UNARY
from fetchproxy.errors import REASONS, seconds
from fetchproxy.testing.queue import Held, Queue
from fetchproxy.v1 import fetch_pb2 as pb

_BEAT = 10.0


class Service:
    """Serves a queue."""

    def __init__(self, queue: Queue) -> None:
        """Serves nobody yet."""
        self.queue = queue
        #: The reasons with which the next calls of a method fail.
        self.failures: defaultdict[str, deque[str]] = defaultdict(deque)
        #: All requests and frames of clients.
        self.requests: list[Protobuf] = []
        #: How many of the next answers of a method are lost.
        self.losses: Counter[str] = Counter()
        self._streams: set[_Stream] = set()
        self._attempts: dict[str, list[Held]] = {}
        self._changed: set[asyncio.Event] = set()
        self._timer: asyncio.TimerHandle | None = None

    def handler(self) -> grpc.GenericRpcHandler:
        """All methods, for a server."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, (request, response) in UNARY.items():
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                self._checked(name),
                request_deserializer=request.FromString,
                response_serializer=response.SerializeToString,
            )
        handlers["Consume"] = grpc.stream_stream_rpc_method_handler(
            self.consume,
            request_deserializer=pb.ConsumeRequest.FromString,
            response_serializer=pb.ConsumeResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def changed(self) -> None:
        """Something may be there for those who wait."""
        for event in self._changed:
            event.set()
        if self._timer:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        if (ends := self.queue.next_lapse()) < math.inf:
            self._timer = loop.call_at(max(ends, loop.time()), self.lapse)

    def lapse(self) -> None:
        """Leases that have ended free their messages."""
        self.queue.lapse(self._now())
        self.changed()

    def cut(self) -> None:
        """Ends all streams."""
        for stream in self._streams:
            stream.cut = True
        self.changed()

    def close(self) -> None:
        """Stops the clock."""
        if self._timer:
            self._timer.cancel()

    @contextlib.contextmanager
    def listening(self) -> Any:
        """An event that each change sets."""
        event = asyncio.Event()
        self._changed.add(event)
        try:
            yield event
        finally:
            self._changed.discard(event)

    def _checked(self, name: str) -> Any:
        method = getattr(self, f"_{name.lower()}")

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            self.requests.append(request)
            await self._fail(name, context)
            answer = await method(request, context)
            if self.losses[name]:
                self.losses[name] -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
            return answer

        return call

    async def _fail(self, name: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self.failures[name]:
            await refuse(context, self.failures[name].popleft(), "the test wants this")

    async def _fetch(self, request: pb.FetchRequest, _: Any) -> pb.FetchResponse:
        wait = seconds(request.max_wait) if request.HasField("max_wait") else 30.0
        lease = seconds(request.lease) if request.HasField("lease") else None
        until = self._now() + wait
        answer = pb.FetchResponse()
        taken = self._attempts.setdefault(request.attempt_id or str(id(answer)), [])
        for held in taken:
            if held.is_open:
                self.queue.put(held, self._now(), request.codec, answer)
        with self.listening() as event:
            while not answer.messages and not answer.rejected:
                event.clear()
                while len(answer.messages) + len(answer.rejected) < max(1, request.n):
                    new = self.queue.take(self._now(), lease)
                    if new is None:
                        break
                    taken.append(new)
                    self.queue.put(new, self._now(), request.codec, answer)
                left = until - self._now()
                if answer.messages or answer.rejected or left <= 0:
                    break
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(event.wait(), left)
        if not answer.messages:
            rejected = pb.EMPTY_REASON_REJECTED if answer.rejected else None
            answer.empty_reason = rejected or pb.EMPTY_REASON_NO_MESSAGES
        self.changed()
        return answer

    async def _giveback(self, request: pb.GiveBackRequest, _: Any) -> pb.GiveBackResponse:
        taken = [held for held in self._attempts.pop(request.attempt_id, []) if held.is_open]
        for held in taken:
            self.queue.release(held)
        self.changed()
        return pb.GiveBackResponse(messages=len(taken))

    async def _settle(self, request: pb.SettleRequest, _: Any) -> pb.SettleResponse:
        results = [self.settle(part, None) for part in request.settlements]
        failed = sum(1 for result in results if result.error.reason)
        return pb.SettleResponse(results=results, failed=failed)

    async def _ack(self, request: pb.AckRequest, context: Any) -> pb.AckResponse:
        part = pb.Settlement(token=request.token, ack=pb.AckAction())
        return pb.AckResponse(outcome=(await self._one(part, context)).outcome)

    async def _nak(self, request: pb.NakRequest, context: Any) -> pb.NakResponse:
        part = pb.Settlement(token=request.token, nak=pb.NakAction(delay=request.delay))
        return pb.NakResponse(outcome=(await self._one(part, context)).outcome)

    async def _term(self, request: pb.TermRequest, context: Any) -> pb.TermResponse:
        part = pb.Settlement(token=request.token, term=pb.TermAction(reason=request.reason))
        return pb.TermResponse(outcome=(await self._one(part, context)).outcome)

    async def _extend(self, request: pb.ExtendRequest, context: Any) -> pb.ExtendResponse:
        lease = request.lease if request.HasField("lease") else None
        part = pb.Settlement(token=request.token, extend=pb.ExtendAction(lease=lease))
        return pb.ExtendResponse(lease=(await self._one(part, context)).lease)

    async def _one(self, settlement: pb.Settlement, context: Any) -> pb.SettleResult:
        result = self.settle(settlement, None)
        if result.error.reason:
            await refuse(context, result.error.reason, result.error.message)
        return result

    def settle(self, settlement: pb.Settlement, held: Held | None) -> pb.SettleResult:
        """Carries out one settlement."""
        if self.failures["settlement"]:
            reason = self.failures["settlement"].popleft()
            return pb.SettleResult(error=error_of(reason, "the test wants this"))
        result = self.queue.settle(settlement, held, self._now())
        self.changed()
        return result

    async def consume(
        self,
        requests: AsyncIterator[pb.ConsumeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.ConsumeResponse]:
        """One stream."""
        frames = aiter(requests)
        # A client whose first write fails would not see the reason: grpcio then reports INTERNAL.
        first = await anext(frames, None)
        await self._fail("Consume", context)
        with self.listening() as event:
            stream = _Stream(self, event)
            self._streams.add(stream)
            if first is not None:
                stream.take(first)
            reader = asyncio.ensure_future(stream.read(frames))
            reader.add_done_callback(lambda _: event.set())
            try:
                while not reader.done() or event.is_set():
                    event.clear()
                    if stream.cut:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "it is cut")
                    yield stream.frame(self._now())
                    if not event.is_set() and not reader.done():
                        with contextlib.suppress(asyncio.TimeoutError):
                            await asyncio.wait_for(event.wait(), stream.beat / 2)
            finally:
                reader.cancel()
                self._streams.discard(stream)
                stream.end(self._now())
                self.changed()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


class _Stream:
    """The state of one Consume."""

    def __init__(self, service: Service, event: asyncio.Event) -> None:
        self._service = service
        self._event = event
        self._start = pb.ConsumeStart()
        self._credit = 0
        self._credit_id = 0
        self._number = 0
        self._held: dict[int, Held] = {}
        self._results: list[pb.ConsumeResult] = []
        self.beat = _BEAT
        self.cut = False

    async def read(self, frames: AsyncIterator[pb.ConsumeRequest]) -> None:
        async for frame in frames:
            self.take(frame)

    def take(self, frame: pb.ConsumeRequest) -> None:
        self._service.requests.append(frame)
        if frame.HasField("start"):
            self._start = frame.start
            self._credit = frame.start.credit.max_leases
            self.beat = seconds(frame.start.heartbeat) or _BEAT
        if frame.HasField("credit"):
            self._credit, self._credit_id = frame.credit.max_leases, frame.credit.id
        if frame.HasField("settle"):
            parts = frame.settle.settlements
            results = [self._service.settle(part, self._held.get(part.number)) for part in parts]
            self._results.append(pb.ConsumeResult(id=frame.settle.id, results=results))
        self._event.set()

    def frame(self, now: float) -> pb.ConsumeResponse:
        frame = pb.ConsumeResponse(credit_id=self._credit_id, results=self._results)
        self._results = []
        for number, held in list(self._held.items()):
            if held.expired:
                why = pb.SettleError(reason="LEASE_EXPIRED", message="the lease has ended")
                frame.ended.append(pb.ConsumeEnded(number=number, why=why))
            if not held.is_open:
                del self._held[number]
        keep = self._start.keep
        while len(self._held) < self._credit:
            new = self._service.queue.take(now, None)
            if new is None:
                break
            self._number += 1
            new.number = self._number
            new.at_most = now + (seconds(keep.at_most) if keep.HasField("at_most") else 3600)
            new.ends = new.at_most
            self._held[new.number] = new
            self._service.queue.put(new, now, self._start.codec, frame)
        if frame.messages or frame.rejected:
            self._service.changed()
        return frame

    def end(self, now: float) -> None:
        """The leases outlive their stream by its grace."""
        for held in self._held.values():
            held.ends = min(held.ends, now + seconds(self._start.keep.grace))


def error_of(reason: str, message: str) -> pb.SettleError:
    """The failure of a part. A reason that is worth a repeat has a delay, as from a proxy."""
    code = REASONS[reason]
    repeats = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
    delay = Duration(nanos=10_000_000) if repeats else None
    return pb.SettleError(reason=reason, message=message, retry_delay=delay)


async def refuse(context: grpc.aio.ServicerContext[Any, Any], reason: str, message: str) -> None:
    """Ends a call with the status of a reason."""
    code = REASONS[reason]
    packed = Packed()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="fetchproxy"))
    status = status_pb2.Status(code=code.value[0], message=message, details=[packed])
    details = ("grpc-status-details-bin", status.SerializeToString())
    await context.abort(code, message, (details,))
