"""Threads for handlers that are no coroutines. They do not keep the process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

_Job: TypeAlias = Callable[[], None]


class Threads:
    """At most `most` threads, each made when it is needed."""

    def __init__(self, most: int) -> None:
        """Starts no thread."""
        self._most = most
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started = 0
        self._running = 0
        #: Threads whose caller was cancelled, and that still run.
        self.stuck = 0
        #: Called when one of them has ended.
        self.on_free: Callable[[], None] = lambda: None

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of the function. If this is cancelled, the thread continues, and is `stuck`."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()
        cancelled = False

        def finish(value: Any, error: BaseException | None) -> None:
            self._running -= 1
            if cancelled:
                self.stuck -= 1
                self.on_free()
            elif error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)

        def job() -> None:
            value: Any = None
            error: BaseException | None = None
            if not cancelled:
                try:
                    value = context.run(function, *args)
                except StopIteration as stop:
                    error = RuntimeError(f"the handler raised {stop!r}")
                except BaseException as raised:  # noqa: BLE001
                    error = raised
            with contextlib.suppress(RuntimeError):  # The loop has ended, and nobody waits.
                loop.call_soon_threadsafe(finish, value, error)

        self._running += 1
        if self._started < min(self._running, self._most):
            self._started += 1
            threading.Thread(target=self._work, name="fetchproxy-handler", daemon=True).start()
        self._jobs.put(job)
        try:
            return await result
        except asyncio.CancelledError:
            if not result.done() or result.cancelled():
                cancelled = True
                self.stuck += 1
            raise

    def end(self) -> None:
        """Ends the threads that have nothing to do, and the others when they are done."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()
