"""Workers of fetch-proxy: NATS JetStream pull consumers over gRPC, with leases.

`Worker` runs a handler for each message of a consumer. `Client` makes single calls.
`fetchproxy.testing` has a proxy in memory for unit tests.
"""

from fetchproxy.client import Client, Effect, Fetched, Settlement
from fetchproxy.errors import FetchProxyError
from fetchproxy.events import (
    Acked,
    Event,
    HandlerError,
    Lost,
    MessageEvent,
    Nacked,
    Ready,
    Rejected,
    Retry,
    Returned,
    Stopped,
    Termed,
    log_event,
)
from fetchproxy.message import Message, RejectedMessage
from fetchproxy.outcome import Nak, Term
from fetchproxy.worker import Worker

__all__ = [
    "Acked",
    "Client",
    "Effect",
    "Event",
    "FetchProxyError",
    "Fetched",
    "HandlerError",
    "Lost",
    "Message",
    "MessageEvent",
    "Nacked",
    "Nak",
    "Ready",
    "Rejected",
    "RejectedMessage",
    "Retry",
    "Returned",
    "Settlement",
    "Stopped",
    "Term",
    "Termed",
    "Worker",
    "log_event",
]
