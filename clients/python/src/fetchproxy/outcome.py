"""How a message is settled, and how a handler says so."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from fetchproxy.contract import nak_of, term_of
from fetchproxy.v1 import fetch_pb2 as pb

# The delays of a Nak after an error of the handler, in seconds.
_FIRST_DELAY: Final = 5.0
_LAST_DELAY: Final = 300.0
# The delay in seconds of a message that another worker may accept.
TOO_LARGE_DELAY: Final = 60.0


class Nak(Exception):
    """Not now: raise or return it, and the message comes back after `delay` seconds."""

    def __init__(self, delay: float | timedelta = 0.0) -> None:
        """A delay above 24 hours is lowered to that."""
        self.delay: Final = delay.total_seconds() if isinstance(delay, timedelta) else float(delay)
        super().__init__(f"again in {self.delay:g} s")


class Term(Exception):
    """Never: raise or return it, and the message does not come back."""

    def __init__(self, reason: str = "") -> None:
        """The reason stands in the advisory of JetStream, cut to 1 KiB."""
        self.reason: Final = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Outcome:
    """The settlement of one message."""

    action: pb.AckAction | pb.NakAction | pb.TermAction
    #: The Nak is that of a stop, and not of the handler.
    returned: bool = False

    def put(self, settlement: pb.Settlement) -> None:
        """Writes the action into a settlement."""
        if isinstance(self.action, pb.AckAction):
            settlement.ack.CopyFrom(self.action)
        elif isinstance(self.action, pb.NakAction):
            settlement.nak.CopyFrom(self.action)
        else:
            settlement.term.CopyFrom(self.action)


ACK: Final = Outcome(pb.AckAction())
RETURN: Final = Outcome(nak_of(0), returned=True)


def of_result(result: object) -> Outcome:
    """The outcome that a handler returned or raised, if it is no error."""
    if isinstance(result, Nak):
        return Outcome(nak_of(result.delay))
    if isinstance(result, Term):
        return Outcome(term_of(result.reason))
    return ACK


def of_error(delivery_count: int) -> Outcome:
    """The outcome after an error of the handler: a Nak whose delay grows with each attempt."""
    doubled = _FIRST_DELAY * 2.0 ** min(max(0, delivery_count - 1), 10)
    return Outcome(nak_of(min(_LAST_DELAY, doubled)))


def of_rejected(rejected: pb.Rejected) -> Outcome:
    """The outcome of a rejected message that is still leased to this worker."""
    if rejected.cause == pb.REJECTED_CAUSE_TOO_LARGE:
        return Outcome(nak_of(TOO_LARGE_DELAY))
    return Outcome(term_of(rejected.detail))
