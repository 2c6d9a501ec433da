"""The messages of the fake: who has them, and what has become of them. Has no clock and no network."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final, Literal, TypeAlias

from google.protobuf.duration_pb2 import Duration

from fetchproxy.contract import duration
from fetchproxy.errors import seconds
from fetchproxy.v1 import fetch_pb2 as pb

Answer: TypeAlias = pb.FetchResponse | pb.ConsumeResponse
Action: TypeAlias = Literal["ack", "nak", "term"]


@dataclass(frozen=True)
class Settled:
    """A settlement that the fake has carried out."""

    action: Action
    attempt: int
    #: The delay of a Nak in seconds.
    delay: float = 0.0
    #: The reason of a Term.
    reason: str = ""


@dataclass(eq=False)
class Record:
    """A message of the fake."""

    sequence: int
    payload: bytes
    subject: str
    headers: dict[str, list[str]]
    timestamp: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    #: How often it was delivered.
    attempts: int = 0
    settlements: list[Settled] = field(default_factory=list)
    #: It is not delivered again.
    ended: bool = False


@dataclass(eq=False)
class Held:
    """A delivery. It is leased until `ends`."""

    record: Record
    token: str
    ends: float
    length: float
    number: int = 0
    settled_as: Action | None = None
    expired: bool = False
    #: The end of the lease at the latest, whatever extends it.
    at_most: float = math.inf

    @property
    def is_open(self) -> bool:
        """Whether it can still be settled."""
        return self.settled_as is None and not self.expired


class Queue:
    """One stream with one consumer. Times are seconds of any clock."""

    def __init__(self, max_deliver: int, ack_wait: float) -> None:
        """An empty stream."""
        self.max_deliver: Final = max_deliver
        self.ack_wait: Final = ack_wait
        self.records: list[Record] = []
        self._ready: deque[Record] = deque()
        self._held: dict[str, Held] = {}

    @property
    def is_idle(self) -> bool:
        """Whether every message has ended."""
        return all(record.ended for record in self.records)

    def publish(self, payload: bytes, subject: str, headers: dict[str, list[str]]) -> Record:
        """Adds a message at the end."""
        record = Record(len(self.records) + 1, payload, subject, headers)
        self.records.append(record)
        self._ready.append(record)
        return record

    def take(self, now: float, length: float | None) -> Held | None:
        """The next message, leased."""
        if not self._ready:
            return None
        record = self._ready.popleft()
        record.attempts += 1
        granted = self.ack_wait if length is None else length
        token = f"fake-{record.sequence}-{record.attempts}"
        held = Held(record, token, now + granted, granted)
        self._held[token] = held
        return held

    def put(self, held: Held, now: float, codec: pb.Codec, into: Answer) -> None:
        """Adds a delivery to an answer. A payload that is not of the codec is rejected and still
        leased, as if the Term of the proxy were not confirmed: so the worker settles it."""
        if fault := _fault(held.record, codec):
            into.rejected.append(_rejected(held, now, fault))
        else:
            into.messages.append(self._delivery(held, now, codec))

    def _delivery(self, held: Held, now: float, codec: pb.Codec) -> pb.Delivery:
        record = held.record
        delivery = pb.Delivery(
            token=held.token,
            subject=record.subject,
            headers={name: pb.HeaderValues(values=all) for name, all in record.headers.items()},
            stream_sequence=record.sequence,
            consumer_sequence=record.sequence,
            delivery_count=record.attempts,
            max_deliver=self.max_deliver,
            number=held.number,
            lease=_left(held, now),
        )
        delivery.publish_time.FromDatetime(record.timestamp)
        if codec in (pb.CODEC_JSON, pb.CODEC_TEXT):
            delivery.text = record.payload.decode()
        else:
            delivery.data = record.payload
        return delivery

    def settle(self, settlement: pb.Settlement, held: Held | None, now: float) -> pb.SettleResult:
        """Carries out a settlement of `held`, or of its token."""
        held = held or self._held.get(settlement.token)
        if held is None:
            return _error("TOKEN_INVALID", "this is not a token of this fake")
        kind = settlement.WhichOneof("action")
        if held.expired or (held.is_open and held.ends <= now):
            return _error("LEASE_EXPIRED", "the lease has ended")
        if held.settled_as is not None:
            if held.settled_as == kind:
                return pb.SettleResult(outcome=pb.OUTCOME_DUPLICATE)
            return _error("LEASE_SETTLED", f"the message was settled as {held.settled_as}")
        if kind == "extend":
            asked = settlement.extend
            length = seconds(asked.lease) if asked.HasField("lease") else held.length
            held.ends = min(now + length, held.at_most)
            return pb.SettleResult(outcome=pb.OUTCOME_EXTENDED, lease=duration(held.ends - now))
        self._end(held, settlement)
        return pb.SettleResult(outcome=pb.OUTCOME_CONFIRMED)

    def lapse(self, now: float) -> list[Held]:
        """The leases that have just ended: their messages are delivered again."""
        over = [held for held in self._held.values() if held.is_open and held.ends <= now]
        for held in over:
            held.expired = True
            self._again(held.record)
        return over

    def next_lapse(self) -> float:
        """When the next lease ends."""
        return min((held.ends for held in self._held.values() if held.is_open), default=math.inf)

    def expire(self, record: Record) -> None:
        """Ends the lease of a message, if there is one."""
        for held in self._held.values():
            if held.record is record and held.is_open:
                held.ends = -math.inf

    def release(self, held: Held) -> None:
        """Takes back a delivery that nobody has seen: it costs no attempt."""
        if held.is_open:
            held.expired = True
            held.record.attempts -= 1
            self._ready.appendleft(held.record)

    def _end(self, held: Held, settlement: pb.Settlement) -> None:
        record, attempt = held.record, held.record.attempts
        if settlement.HasField("nak"):
            held.settled_as = "nak"
            delay = seconds(settlement.nak.delay)
            record.settlements.append(Settled("nak", attempt, delay=delay))
            self._again(record)
            return
        if settlement.HasField("term"):
            held.settled_as = "term"
            record.settlements.append(Settled("term", attempt, reason=settlement.term.reason))
        else:
            held.settled_as = "ack"
            record.settlements.append(Settled("ack", attempt))
        record.ended = True

    def _again(self, record: Record) -> None:
        if 0 < self.max_deliver <= record.attempts:
            record.ended = True
        else:
            self._ready.append(record)


def _fault(record: Record, codec: pb.Codec) -> str:
    """Why the payload is not of the codec. Empty: it is."""
    try:
        if codec in (pb.CODEC_JSON, pb.CODEC_TEXT):
            text = record.payload.decode()
            if codec == pb.CODEC_JSON and not (text == "" and record.headers):
                json.loads(text)
    except ValueError as error:
        return f"not readable: {error}"
    return ""


def _rejected(held: Held, now: float, fault: str) -> pb.Rejected:
    record = held.record
    return pb.Rejected(
        cause=pb.REJECTED_CAUSE_CODEC,
        detail=fault,
        subject=record.subject,
        stream_sequence=record.sequence,
        delivery_count=record.attempts,
        size=len(record.payload),
        data=record.payload,
        token=held.token,
        number=held.number,
        lease=_left(held, now),
    )


def _left(held: Held, now: float) -> Duration:
    return duration(min(max(0.0, held.ends - now), 3600.0))


def _error(reason: str, message: str) -> pb.SettleResult:
    return pb.SettleResult(error=pb.SettleError(reason=reason, message=message))
