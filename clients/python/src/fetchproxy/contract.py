"""The methods of the contract with their types, and conversions of its values."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as Protobuf

from fetchproxy.v1 import fetch_pb2 as pb

SERVICE: Final = "fetchproxy.v1.FetchService"

# Each method with a single request and a single answer. Consume is the method with two streams.
UNARY: Final[dict[str, tuple[type[Protobuf], type[Protobuf]]]] = {
    "Fetch": (pb.FetchRequest, pb.FetchResponse),
    "GiveBack": (pb.GiveBackRequest, pb.GiveBackResponse),
    "Ack": (pb.AckRequest, pb.AckResponse),
    "Nak": (pb.NakRequest, pb.NakResponse),
    "Term": (pb.TermRequest, pb.TermResponse),
    "Extend": (pb.ExtendRequest, pb.ExtendResponse),
    "Settle": (pb.SettleRequest, pb.SettleResponse),
}

# A call with more settlements is refused.
MOST_SETTLEMENTS: Final = 1000
# The most bytes of the settlements in a frame: a frame of a Consume may have 512 KiB.
MOST_FRAME_BYTES: Final = 400 << 10
# The largest answer and frame in bytes. A larger value is lowered by the proxy.
MAX_ANSWER: Final = 16 << 20
# The most bytes that a stream may hold.
MAX_CREDIT_BYTES: Final = 64 << 20
# The longest delay of a Nak in seconds. A longer delay would fail the whole call.
LONGEST_DELAY: Final = 24 * 3600.0
# The longest reason of a Term in bytes.
LONGEST_REASON: Final = 1024
# The shortest lease, grace and heartbeat in seconds.
SHORTEST: Final = 1.0
# The longest wait of a Fetch in seconds.
LONGEST_FETCH: Final = 300.0


def duration(length: float) -> Duration:
    """A length in seconds, as the contract has it."""
    value = Duration()
    value.FromTimedelta(timedelta(seconds=length))
    return value


def nak_of(delay: float) -> pb.NakAction:
    """A Nak that no proxy refuses."""
    return pb.NakAction(delay=duration(min(max(0.0, delay), LONGEST_DELAY)))


def term_of(reason: str) -> pb.TermAction:
    """A Term with a reason that is valid UTF-8 and not too long."""
    text = reason.encode(errors="replace")[:LONGEST_REASON].decode(errors="ignore")
    return pb.TermAction(reason=text)
