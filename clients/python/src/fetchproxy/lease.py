"""A message in hand: from its delivery until it is settled or lost."""

from __future__ import annotations

import asyncio
from typing import Any

from fetchproxy.message import Message
from fetchproxy.outcome import Outcome
from fetchproxy.v1 import fetch_pb2 as pb


class Lease:
    """A message that is ours until it is `gone`."""

    def __init__(self, source: pb.Delivery | pb.Rejected, until: float) -> None:
        """`until` is the time of the loop's clock at which the handler has had its longest time."""
        self.token = source.token
        self.size = source.ByteSize()
        self.until = until
        #: None: the message was rejected, so that no handler gets it.
        self.message: Message[Any] | None = None
        self.task: asyncio.Task[None] | None = None
        self.outcome: Outcome | None = None
        #: Settled or lost.
        self.gone = False

    @property
    def is_undecided(self) -> bool:
        """Whether its handler runs, or is still to run."""
        return not self.gone and self.outcome is None

    @property
    def is_last_attempt(self) -> bool:
        """Whether a Nak would end the message."""
        return self.message is not None and self.message.is_last_attempt

    def decide(self, outcome: Outcome) -> None:
        """Notes the first outcome, and has it settled."""
        if self.is_undecided:
            self.outcome = outcome
            self.decided()

    def decided(self) -> None:
        """An outcome is there. The loop that has the lease sends it."""
        raise NotImplementedError

    def leave(self) -> None:
        """It is over. A handler that still runs is cancelled."""
        self.gone = True
        self.cancel()

    def cancel(self) -> None:
        """Cancels the handler, if it runs."""
        if self.message is not None and (self.task is None or not self.task.done()):
            self.message.cancelled.set()
        if self.task is not None:
            self.task.cancel()
