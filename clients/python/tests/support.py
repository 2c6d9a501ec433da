"""What several tests share: events are kept, and coroutines are run with a limit of time."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from fetchproxy import Client, Event, Message, MessageEvent, Worker

T = TypeVar("T")
LIMIT = 20.0

both_modes = pytest.mark.parametrize("mode", ["consume", "fetch"])


def in_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test that is a coroutine."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **named), LIMIT))

    return run


class Events:
    """The events of a worker, in order."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._more = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.all.append(event)
        self._more.set()

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.all]

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.all if isinstance(event, kind)]

    async def until(self, kind: type[T], count: int = 1) -> T:
        """The last of so many events of this kind."""
        while len(self.of(kind)) < count:
            self._more.clear()
            await self._more.wait()
        return self.of(kind)[count - 1]

    def attempts(self) -> list[tuple[str, int]]:
        """Each event about a message, with the number of the attempt."""
        messages = self.of(MessageEvent)
        return [(event.name, event.message.delivery_count) for event in messages]


def worker(client: Client, handler: Callable[[Message[Any]], Any], **options: Any) -> Worker[Any]:
    """A worker of the fake."""
    options.setdefault("grace", 1.0)
    return Worker(client, "TASKS", "workers", handler, **options)
