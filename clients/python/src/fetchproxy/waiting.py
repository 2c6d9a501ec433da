"""Waits that another event may end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def unless(event: asyncio.Event, wanted: Coroutine[Any, Any, T]) -> T | None:
    """The result of `wanted`. If `event` is set first, cancels it and returns None."""
    if event.is_set():
        wanted.close()
        return None
    work = asyncio.ensure_future(wanted)
    happened = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({work, happened}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        happened.cancel()
        await end(work)


async def end(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits until it has ended, whatever its result."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
