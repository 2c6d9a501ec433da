"""A message as a handler sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Generic, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from fetchproxy.errors import seconds
from fetchproxy.v1 import fetch_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True)
class Message(Generic[T]):
    """One attempt to deliver a message, leased to this worker."""

    #: The decoded payload. None for a message without payload, such as a tombstone.
    data: T
    #: The payload as published.
    payload: bytes = field(repr=False)
    #: The subject under which the stream stores the message.
    subject: str
    #: Each header with all its values, in order.
    headers: Mapping[str, tuple[str, ...]]
    #: The number in the stream, from 1.
    stream_sequence: int
    #: The number of this attempt, from 1.
    delivery_count: int
    #: The number of attempts after which JetStream gives the message up. 0: never.
    max_deliver: int
    #: When the stream stored the message, in UTC.
    timestamp: datetime
    #: Settles this attempt, for a call of one's own.
    token: str = field(repr=False)
    #: How much of the lease was left when the proxy sent the message, in seconds.
    lease: float = field(repr=False)
    #: Set when the handler is to end early. A handler in a thread cannot be interrupted: it can look.
    cancelled: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    @property
    def is_last_attempt(self) -> bool:
        """Whether JetStream gives the message up after this attempt."""
        return 0 < self.max_deliver <= self.delivery_count


@dataclass(frozen=True)
class RejectedMessage:
    """A message that the proxy could not deliver as asked."""

    #: The exact fault, for people.
    detail: str
    #: Whether the message alone is larger than `max_bytes`. Otherwise its payload failed the codec.
    too_large: bool
    subject: str
    stream_sequence: int
    delivery_count: int
    #: The size of the payload in bytes.
    size: int
    #: The payload that failed the codec.
    payload: bytes = field(repr=False)
    headers: Mapping[str, tuple[str, ...]]
    #: Set if the message is still leased to the caller, who should settle it. Otherwise empty.
    token: str = field(repr=False)


def payload_of(delivery: pb.Delivery) -> bytes:
    """The payload as published."""
    if delivery.WhichOneof("payload") == "text":
        return delivery.text.encode()
    return delivery.data


def message_of(delivery: pb.Delivery, decode: Callable[[bytes], T]) -> Message[T]:
    """Decodes a delivery. All errors of `decode` pass."""
    payload = payload_of(delivery)
    return Message(
        data=decode(payload),
        payload=payload,
        subject=delivery.subject,
        headers=_headers(delivery.headers),
        stream_sequence=delivery.stream_sequence,
        delivery_count=delivery.delivery_count,
        max_deliver=delivery.max_deliver,
        timestamp=_time(delivery.publish_time),
        token=delivery.token,
        lease=seconds(delivery.lease),
    )


def rejected_of(rejected: pb.Rejected) -> RejectedMessage:
    """A rejected message of the contract, for people and programs."""
    return RejectedMessage(
        detail=rejected.detail,
        too_large=rejected.cause == pb.REJECTED_CAUSE_TOO_LARGE,
        subject=rejected.subject,
        stream_sequence=rejected.stream_sequence,
        delivery_count=rejected.delivery_count,
        size=rejected.size,
        payload=rejected.data,
        headers=_headers(rejected.headers),
        token=rejected.token,
    )


def _headers(headers: Mapping[str, pb.HeaderValues]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(values.values) for name, values in headers.items()}


def _time(time: Timestamp) -> datetime:
    return time.ToDatetime(tzinfo=timezone.utc)
