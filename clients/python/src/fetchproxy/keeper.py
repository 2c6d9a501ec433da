"""Leases of Fetch: one task settles and extends all of them, so no outcome waits for a slow message."""

from __future__ import annotations

import asyncio

import grpc

from fetchproxy.backoff import Backoff
from fetchproxy.channel import Channel
from fetchproxy.contract import MOST_SETTLEMENTS, SHORTEST, duration
from fetchproxy.errors import FetchProxyError, of_call, of_part, part_is_repeatable, seconds
from fetchproxy.handling import Handling
from fetchproxy.lease import Lease
from fetchproxy.v1 import fetch_pb2 as pb

# How long an outcome waits for others, so that they go in one call, in seconds.
_LINGER = 0.01
# A lease is extended when this share of the rest of it has passed.
_SHARE = 1 / 3
# The longest deadline of a Settle in seconds. The proxy answers within 5 s.
_DEADLINE = 10.0


class FetchedLease(Lease):
    """A message of a Fetch. Times are those of the loop's clock."""

    def __init__(self, source: pb.Delivery | pb.Rejected, until: float, keeper: Keeper) -> None:
        """The lease lasts as long as the answer says, counted from now."""
        super().__init__(source, until)
        self._keeper = keeper
        #: The length that was granted, in seconds.
        self.length = seconds(source.lease)
        #: Decided, and not sent yet.
        self.fresh = False
        self.ends = self.due = 0.0
        now = asyncio.get_running_loop().time()
        self.renew(now, now, self.length)

    def renew(self, now: float, since: float, length: float) -> None:
        """The lease was granted at `since`."""
        self.ends = since + length
        if not self.fresh:
            self.due = now + max(0.05, (self.ends - now) * _SHARE)

    def decided(self) -> None:
        """Goes with the next call of the keeper."""
        self._keeper.hurry(self)

    def leave(self) -> None:
        """It is over for the keeper, too."""
        super().leave()
        self._keeper.forget(self)

    def settlement(self, now: float) -> pb.Settlement:
        """The outcome. Without one, an Extend as long as it was granted, and not past the longest time."""
        settlement = pb.Settlement(token=self.token)
        if self.outcome:
            self.outcome.put(settlement)
            return settlement
        settlement.extend.SetInParent()
        if self.until < now + self.length:
            settlement.extend.lease.CopyFrom(duration(max(SHORTEST, self.until - now)))
        return settlement


class Keeper:
    """Settles and extends. Nobody else does."""

    def __init__(self, channel: Channel, handling: Handling) -> None:
        """Keeps nothing yet."""
        self._channel = channel
        self._handling = handling
        self.leases: dict[FetchedLease, None] = {}
        self._news = asyncio.Event()
        #: Set when there are fewer leases.
        self.fewer = asyncio.Event()
        self._backoff = Backoff()

    def keep(self, lease: FetchedLease) -> None:
        """From now on until it is gone."""
        self.leases[lease] = None
        self._news.set()

    def hurry(self, lease: FetchedLease) -> None:
        """An outcome is there. It waits a moment for others, unless nothing else is worked on."""
        alone = not any(other.is_undecided for other in self.leases)
        lease.fresh = True
        lease.due = asyncio.get_running_loop().time() + (0 if alone else _LINGER)
        self._news.set()
        self.fewer.set()

    def forget(self, lease: FetchedLease) -> None:
        """The lease is gone."""
        self.leases.pop(lease, None)
        self._news.set()
        self.fewer.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._news.clear()
            now = loop.time()
            first = min((lease.due for lease in self.leases), default=None)
            if first is None or first > now:
                timer = loop.call_at(first, self._news.set) if first else None
                await self._news.wait()
                if timer:
                    timer.cancel()
                continue
            for lease in list(self.leases):
                if lease.ends <= now:
                    self._handling.lose(lease, "its time is over")
                elif lease.until <= now and lease.is_undecided:
                    self._handling.lose(lease, "its handler has had the longest time, at_most")
            due = [lease for lease in self.leases if lease.fresh or lease.due <= now]
            if due:
                await self._settle(due[:MOST_SETTLEMENTS])

    async def _settle(self, leases: list[FetchedLease]) -> None:
        """One call for all of them. A repeat with the same tokens harms nobody."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        request = pb.SettleRequest(settlements=[lease.settlement(began) for lease in leases])
        for lease in leases:
            lease.fresh = False
        left = min(lease.ends for lease in leases) - began
        try:
            deadline = min(max(SHORTEST, left / 2), _DEADLINE)
            results = (await self._channel.call("Settle", request, deadline)).results
        except grpc.aio.AioRpcError as failure:
            error = of_call(failure)
            if error.is_repeatable:
                await asyncio.sleep(self._failed(error))
                return
            failed = pb.SettleError(reason=error.reason, message=error.message)
            results = [pb.SettleResult(error=failed)] * len(leases)
        self._results(leases, results, began)

    def _results(
        self, leases: list[FetchedLease], results: list[pb.SettleResult], began: float
    ) -> None:
        now = asyncio.get_running_loop().time()
        again: list[tuple[FetchedLease, FetchProxyError]] = []
        for lease, result in zip(leases, results, strict=True):
            if part_is_repeatable(result.error):
                again.append((lease, of_part(result.error)))
            elif result.error.reason:
                self._handling.lose(lease, f"{result.error.reason}: {result.error.message}")
            elif result.outcome == pb.OUTCOME_EXTENDED:
                lease.renew(now, began, seconds(result.lease))
            else:
                self._handling.settled(lease)
        if not again:
            self._backoff.reset()
            return
        wait = self._failed(max((e for _, e in again), key=lambda e: e.retry_delay or 0))
        for lease, _ in again:
            if not lease.fresh:
                lease.due = now + wait

    def _failed(self, error: FetchProxyError) -> float:
        wait = self._backoff.next(error.retry_delay)
        self._handling.retry(error, wait)
        return wait
