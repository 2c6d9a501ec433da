"""The events of a worker, and the log that is kept of them by default."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from fetchproxy.message import Message, RejectedMessage

_log = logging.getLogger("fetchproxy")


@dataclass(frozen=True)
class Event:
    """An event of a worker."""

    #: The name of the event, the same in all languages.
    name: ClassVar[str]


@dataclass(frozen=True)
class MessageEvent(Event):
    """An event about a message."""

    message: Message[Any]


@dataclass(frozen=True)
class Ready(Event):
    """The worker begins."""

    name = "ready"


@dataclass(frozen=True)
class Stopped(Event):
    """The worker ends without an error."""

    name = "stopped"


@dataclass(frozen=True)
class Acked(MessageEvent):
    """The proxy has confirmed the Ack."""

    name = "acked"


@dataclass(frozen=True)
class Nacked(MessageEvent):
    """The proxy has confirmed the Nak."""

    name = "nacked"
    #: In seconds.
    delay: float


@dataclass(frozen=True)
class Termed(MessageEvent):
    """The proxy has confirmed the Term."""

    name = "termed"
    reason: str


@dataclass(frozen=True)
class Returned(MessageEvent):
    """The message was given back at a stop."""

    name = "returned"


@dataclass(frozen=True)
class Lost(MessageEvent):
    """The lease is lost. The handler is cancelled, and its outcome is dropped."""

    name = "lost"
    reason: str


@dataclass(frozen=True)
class HandlerError(MessageEvent):
    """The handler has failed with an error of its own."""

    name = "handler_error"
    error: BaseException


@dataclass(frozen=True)
class Rejected(Event):
    """The proxy could not deliver a message as asked."""

    name = "rejected"
    rejected: RejectedMessage


@dataclass(frozen=True)
class Retry(Event):
    """A call failed, and is repeated after `wait` seconds."""

    name = "retry"
    reason: str
    detail: str
    wait: float


def log_event(event: Event) -> None:
    """Logs by the logger `fetchproxy`: a warning for each event that a person may have to look at."""
    match event:
        case Termed():
            _log.warning("message %s is terminated: %s", _of(event), event.reason)
        case Lost():
            _log.warning("message %s is lost: %s", _of(event), event.reason)
        case HandlerError():
            _log.warning("message %s: the handler failed", _of(event), exc_info=event.error)
        case Rejected(rejected=rejected):
            _log.warning("message %d is rejected: %s", rejected.stream_sequence, rejected.detail)
        case Retry():
            _log.warning("again in %.1f s: %s: %s", event.wait, event.reason, event.detail)
        case _:
            _log.debug("%s", event)


def _of(event: MessageEvent) -> str:
    message = event.message
    return f"{message.stream_sequence} (attempt {message.delivery_count})"
