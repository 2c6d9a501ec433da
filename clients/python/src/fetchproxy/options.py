"""The options of a worker, checked. docs/reference/client-packages.md has the same table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from fetchproxy.contract import LONGEST_FETCH, MAX_CREDIT_BYTES, SHORTEST

# A heartbeat is a third of the grace, and may be 60 s.
LONGEST_GRACE: Final = 180.0
# A Fetch and a Settle have at most so many messages.
MOST_MESSAGES: Final = 1000
# A longer name is cut by the proxy.
_LONGEST_NAME: Final = 1024


@dataclass(frozen=True)
class Options:
    """What a worker does, and how much of it at once. Lengths are in seconds."""

    stream: str
    consumer: str
    concurrency: int
    mode: Literal["consume", "fetch"]
    batch: int
    max_wait: float
    lease: float | None
    grace: float
    max_bytes: int
    at_most: float
    stop_timeout: float | None
    name: str

    def __post_init__(self) -> None:
        """A value out of its range is a ValueError."""
        if not self.stream or not self.consumer:
            raise ValueError("stream and consumer must not be empty")
        if self.mode not in ("consume", "fetch"):
            raise ValueError(f"mode is {self.mode!r}, and not 'consume' or 'fetch'")
        self._check("concurrency", 1, MOST_MESSAGES)
        self._check("batch", 1, MOST_MESSAGES)
        self._check("max_wait", 0, LONGEST_FETCH)
        self._check("grace", SHORTEST, LONGEST_GRACE)
        self._check("max_bytes", 1024, MAX_CREDIT_BYTES)
        self._check("at_most", SHORTEST, None)
        if self.lease is not None:
            self._check("lease", SHORTEST, None)
        if self.stop_timeout is not None:
            self._check("stop_timeout", 0, None)
        if len(self.name.encode()) > _LONGEST_NAME:
            raise ValueError(f"name has more than {_LONGEST_NAME} bytes")

    def _check(self, name: str, least: float, most: float | None) -> None:
        value: Any = getattr(self, name)
        if not least <= value or (most is not None and value > most):
            to = "or more" if most is None else f"to {most:g}"
            raise ValueError(f"{name} is {value}, and not {least:g} {to}")
