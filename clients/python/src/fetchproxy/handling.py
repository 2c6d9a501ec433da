"""The part that both loops share: handlers are run and cancelled, and events are told."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any

from fetchproxy.contract import term_of
from fetchproxy.errors import FetchProxyError
from fetchproxy.events import (
    Acked,
    Event,
    HandlerError,
    Lost,
    Nacked,
    Rejected,
    Retry,
    Returned,
    Termed,
)
from fetchproxy.lease import Lease
from fetchproxy.message import Message, message_of, rejected_of
from fetchproxy.outcome import (
    RETURN,
    Nak,
    Outcome,
    Term,
    of_error,
    of_rejected,
    of_result,
)
from fetchproxy.threads import Threads
from fetchproxy.tracing import Tracing
from fetchproxy.v1 import fetch_pb2 as pb

_log = logging.getLogger("fetchproxy")


class Handling:
    """Runs handlers, and tells of what becomes of each message."""

    def __init__(
        self,
        handler: Callable[[Message[Any]], Any],
        decode: Callable[[bytes], Any],
        concurrency: int,
        tracing: Tracing,
        on_event: Callable[[Event], None],
    ) -> None:
        """`decode` makes data out of a payload."""
        self._handler = handler
        self._decode = decode
        self._concurrency = concurrency
        self._tracing = tracing
        self._on_event = on_event
        self._threads = Threads(concurrency)
        self._is_async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)  # noqa: B004
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    @property
    def places(self) -> int:
        """How many handlers may run at once: threads that nobody can cancel keep their places."""
        return max(0, self._concurrency - self._threads.stuck)

    def on_free(self, call: Callable[[], None]) -> None:
        """Has a function called when such a thread has ended."""
        self._threads.on_free = call

    def tell(self, event: Event) -> None:
        """Tells of an event. An error of the user's function does not reach the worker."""
        try:
            self._on_event(event)
        except Exception:
            _log.exception("on_event failed at %s", event.name)

    def retry(self, error: FetchProxyError, wait: float) -> None:
        """Tells that a call is repeated."""
        self.tell(Retry(error.reason, error.message, wait))

    def receive(self, lease: Lease, delivery: pb.Delivery) -> None:
        """Gives the lease its message. A payload that cannot be decoded is its outcome already."""
        try:
            lease.message = message_of(delivery, self._decode)
        except Exception as error:
            lease.message = message_of(delivery, lambda _: None)
            lease.decide(Outcome(term_of(f"the payload cannot be decoded: {error!r}")))

    def reject(self, rejected: pb.Rejected) -> Outcome:
        """Tells of a rejected message. The outcome is for a message that is still leased."""
        self.tell(Rejected(rejected_of(rejected)))
        return of_rejected(rejected)

    def begin(self, lease: Lease, done: Callable[[], None] | None = None) -> None:
        """Starts the handler. `done` is called when it has ended, in whatever way."""
        lease.task = asyncio.ensure_future(self._run(lease))
        self._tasks.add(lease.task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if done:
                done()

        lease.task.add_done_callback(ended)

    async def _run(self, lease: Lease) -> None:
        message = lease.message
        assert message is not None
        try:
            outcome = of_result(await self._call(message))
        except (Nak, Term) as wanted:
            outcome = of_result(wanted)
        except (Exception, asyncio.CancelledError) as error:
            if self._ended or not lease.is_undecided:
                return  # It was cancelled, and what it says does not count.
            self.tell(HandlerError(message, error))
            outcome = of_error(message.delivery_count)
        lease.decide(outcome)

    async def _call(self, message: Message[Any]) -> Any:
        with self._tracing.span(message):
            if self._is_async:
                return await self._handler(message)
            result = await self._threads.run(self._handler, message)
            return await result if inspect.isawaitable(result) else result

    def settled(self, lease: Lease) -> None:
        """The proxy has confirmed the outcome."""
        if lease.gone:
            return
        lease.leave()
        message, outcome = lease.message, lease.outcome
        if message is None or outcome is None:
            return  # Its rejection was told.
        if outcome.returned:
            self.tell(Returned(message))
        elif isinstance(outcome.action, pb.AckAction):
            self.tell(Acked(message))
        elif isinstance(outcome.action, pb.NakAction):
            delay = outcome.action.delay.ToTimedelta().total_seconds()
            self.tell(Nacked(message, delay))
        else:
            self.tell(Termed(message, outcome.action.reason))

    def lose(self, lease: Lease, why: str) -> None:
        """The lease is lost: its handler is cancelled."""
        if lease.gone:
            return
        lease.leave()
        if lease.message is not None:
            self.tell(Lost(lease.message, why))

    def give_back(self, lease: Lease) -> None:
        """Ends a message at a stop, whether its handler runs or not."""
        if not lease.is_undecided:
            return
        if lease.is_last_attempt:
            self.lose(lease, "the worker stops, and a Nak would end the last attempt")
        else:
            lease.decide(RETURN)
            lease.cancel()

    async def end(self) -> None:
        """Cancels all handlers and waits until they have ended. Threads may continue."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        self._threads.end()
