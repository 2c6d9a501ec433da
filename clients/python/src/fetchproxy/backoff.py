"""How long to wait before a call is repeated. Decides and waits for nothing."""

import random

# The longest wait of each kind in seconds: docs/how-to/configure-the-channel.md.
LONGEST_WAIT = 5.0
# The wait after the first failure, in seconds. It doubles with each failure.
FIRST_WAIT = 0.1


class Backoff:
    """Waits at least as long as the proxy asks, and longer each time."""

    def __init__(self) -> None:
        """No call has failed yet."""
        self._tries = 0

    def reset(self) -> None:
        """A call has succeeded."""
        self._tries = 0

    def next(self, asked: float | None = None) -> float:
        """The seconds to wait before the next call. `asked` is the `retry_delay` of the failure."""
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(self._tries, 10))
        self._tries += 1
        return min(LONGEST_WAIT, asked or 0) + random.uniform(longest / 2, longest)
