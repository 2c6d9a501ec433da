"""Single calls to the proxy, with deadlines and repeats."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import grpc

from fetchproxy.backoff import Backoff
from fetchproxy.channel import Channel
from fetchproxy.contract import MAX_ANSWER, duration, nak_of, term_of
from fetchproxy.errors import (
    FetchProxyError,
    of_call,
    of_part,
    part_is_repeatable,
    seconds,
)
from fetchproxy.message import Message, RejectedMessage, message_of, rejected_of
from fetchproxy.v1 import fetch_pb2 as pb

# The deadline of a settlement in seconds. The proxy answers within 5 s.
_DEADLINE: Final = 10.0
# The time of a Fetch beyond its wait, in seconds.
_MARGIN: Final = 5.0
# How often a call is made at most.
_TRIES: Final = 5

#: The effect of a settlement.
Effect = Literal["confirmed", "sent", "duplicate", "extended"]
_EFFECTS: Final[dict[int, Effect]] = {
    pb.OUTCOME_CONFIRMED: "confirmed",
    pb.OUTCOME_SENT: "sent",
    pb.OUTCOME_DUPLICATE: "duplicate",
    pb.OUTCOME_EXTENDED: "extended",
}


@dataclass(frozen=True)
class Fetched:
    """The answer to a fetch."""

    messages: Sequence[Message[bytes]]
    rejected: Sequence[RejectedMessage]
    #: Why there are no messages, such as `NO_MESSAGES`. Empty if there are some.
    empty_reason: str
    #: Messages that the consumer has not delivered yet.
    pending: int
    #: Deliveries of the consumer that are not settled, if there are no messages.
    ack_pending: int


@dataclass(frozen=True)
class Settlement:
    """The settlement of one message. Make it by `ack`, `nak`, `term` or `extend`."""

    message: pb.Settlement

    @classmethod
    def ack(cls, token: str) -> Settlement:
        """Done."""
        return cls(pb.Settlement(token=token, ack=pb.AckAction()))

    @classmethod
    def nak(cls, token: str, delay: float = 0.0) -> Settlement:
        """Not now: again after `delay` seconds. A delay above 24 hours is lowered to that."""
        return cls(pb.Settlement(token=token, nak=nak_of(delay)))

    @classmethod
    def term(cls, token: str, reason: str = "") -> Settlement:
        """Never. The reason is cut to 1 KiB."""
        return cls(pb.Settlement(token=token, term=term_of(reason)))

    @classmethod
    def extend(cls, token: str, lease: float | None = None) -> Settlement:
        """A lease of so many seconds from now. None: as long as it was granted."""
        extension = pb.ExtendAction(lease=None if lease is None else duration(lease))
        return cls(pb.Settlement(token=token, extend=extension))


class Client:
    """A channel to one proxy, or to all replicas of a name. It may be shared by many workers."""

    def __init__(
        self,
        address: str,
        *,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        bearer_file: str | None = None,
    ) -> None:
        """The address is `host:port`, `https://host:port` with TLS, or `dns:///name:port`. The others
        name files, which may change. Connects at the first call. A wrong option is a ValueError."""
        #: For workers.
        self.channel: Final = Channel(address, ca, cert, key, bearer_file)

    @classmethod
    def from_env(cls) -> Client:
        """Reads FETCH_PROXY_ADDR (127.0.0.1:50051), _CA, _CERT, _KEY and _BEARER_FILE."""

        def read(name: str) -> str | None:
            return os.environ.get(f"FETCH_PROXY_{name}") or None

        return cls(
            read("ADDR") or "127.0.0.1:50051",
            ca=read("CA"),
            cert=read("CERT"),
            key=read("KEY"),
            bearer_file=read("BEARER_FILE"),
        )

    async def __aenter__(self) -> Client:
        """The client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes it."""
        await self.close()

    async def close(self) -> None:
        """Ends all connections."""
        await self.channel.close()

    async def fetch(
        self,
        stream: str,
        consumer: str,
        n: int = 1,
        *,
        max_wait: float = 10.0,
        lease: float | None = None,
        max_bytes: int = MAX_ANSWER,
    ) -> Fetched:
        """Takes up to `n` messages. Waits for the first of them, for `max_wait` seconds. `lease` is in
        seconds; None: as long as the ack wait of the consumer. Raises FetchProxyError."""
        attempt = str(uuid.uuid4())
        request = pb.FetchRequest(
            stream=stream,
            consumer=consumer,
            n=n,
            max_wait=duration(max_wait),
            lease=None if lease is None else duration(lease),
            max_bytes=max_bytes,
            attempt_id=attempt,
        )
        try:
            answer = await self._call("Fetch", request, max_wait + _MARGIN)
        except asyncio.CancelledError:
            give_back = asyncio.ensure_future(self.give_back(stream, consumer, attempt))
            await asyncio.wait({give_back}, timeout=1)
            give_back.cancel()
            raise
        return Fetched(
            [message_of(delivery, bytes) for delivery in answer.messages],
            [rejected_of(rejected) for rejected in answer.rejected],
            _empty_reason(answer.empty_reason),
            answer.pending,
            answer.ack_pending,
        )

    async def ack(self, token: str) -> Effect:
        """Done. Raises FetchProxyError."""
        return _EFFECTS[(await self._settle("Ack", pb.AckRequest(token=token))).outcome]

    async def nak(self, token: str, delay: float = 0.0) -> Effect:
        """Not now: again after `delay` seconds. Raises FetchProxyError."""
        request = pb.NakRequest(token=token, delay=nak_of(delay).delay)
        return _EFFECTS[(await self._settle("Nak", request)).outcome]

    async def term(self, token: str, reason: str = "") -> Effect:
        """Never. Raises FetchProxyError."""
        request = pb.TermRequest(token=token, reason=term_of(reason).reason)
        return _EFFECTS[(await self._settle("Term", request)).outcome]

    async def extend(self, token: str, lease: float | None = None) -> float:
        """The new length of the lease in seconds. Raises FetchProxyError."""
        length = None if lease is None else duration(lease)
        answer = await self._settle("Extend", pb.ExtendRequest(token=token, lease=length))
        return seconds(answer.lease)

    async def settle(self, settlements: Iterable[Settlement]) -> list[Effect | FetchProxyError]:
        """An effect or an error for each of 1 to 1000 settlements. Raises FetchProxyError if the call
        itself fails."""
        parts = [settlement.message for settlement in settlements]
        results: list[Effect | FetchProxyError | None] = [None] * len(parts)
        left, backoff = list(range(len(parts))), Backoff()
        for again in reversed(range(_TRIES)):
            request = pb.SettleRequest(settlements=[parts[place] for place in left])
            answer = await self._settle("Settle", request)
            places, left, longest = left, [], 0.0
            for place, result in zip(places, answer.results, strict=True):
                if not result.error.reason:
                    results[place] = _EFFECTS[result.outcome]
                    continue
                error = of_part(result.error)
                results[place] = error
                if part_is_repeatable(result.error):
                    left.append(place)
                    longest = max(longest, error.retry_delay or 0)
            if not left or not again:
                break
            await asyncio.sleep(backoff.next(longest))
        return [result for result in results if result is not None]

    async def give_back(self, stream: str, consumer: str, attempt_id: str) -> int:
        """Returns all messages of an attempt, and says how many. Raises FetchProxyError."""
        names = {"stream": stream, "consumer": consumer, "attempt_id": attempt_id}
        answer = await self._settle("GiveBack", pb.GiveBackRequest(**names))
        count: int = answer.messages
        return count

    async def _settle(self, method: str, request: Any) -> Any:
        return await self._call(method, request, _DEADLINE)

    async def _call(self, method: str, request: Any, deadline: float) -> Any:
        backoff = Backoff()
        for again in reversed(range(_TRIES)):
            try:
                return await self.channel.call(method, request, deadline)
            except grpc.aio.AioRpcError as failure:
                error = of_call(failure)
            if not again or not error.is_repeatable:
                raise error
            if method == "Fetch":
                request.attempt_again = True
            await asyncio.sleep(backoff.next(error.retry_delay))
        raise AssertionError("the last try returns or raises")


def _empty_reason(reason: pb.EmptyReason) -> str:
    if reason == pb.EMPTY_REASON_UNSPECIFIED:
        return ""
    return pb.EmptyReason.Name(reason).removeprefix("EMPTY_REASON_")
