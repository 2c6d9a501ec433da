"""What a worker needs around the generated client: the channel, what a refusal means, when to ask
again, and a batch whose leases are kept alive and settled. Copy it; it has no state of its own."""

import asyncio
import json
import random
import time
from dataclasses import dataclass

import grpc
from fetchproxy_pb.v1 import fetch_pb2 as pb
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

# The most that an answer may have. The library's own limit is 4 MiB: both must be raised together.
MAX_BYTES = 16 << 20
# Longer than the proxy takes to answer a settlement, which is 5 s unless it is told otherwise.
SETTLE_TIMEOUT = 10
# The longest delay of a Nak; a longer one would fail the whole call.
LONGEST_DELAY = 24 * 3600
# The longest wait before a call is repeated.
PATIENCE = 5.0
# Of a Fetch: repeating it helps nobody, somebody must look.
HOPELESS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}
# Of a settlement: the message is somebody else's by now, or settled, or will come again.
LOST = {
    "LEASE_EXPIRED",
    "LEASE_SETTLED",
    "TOKEN_INVALID",
    "JETSTREAM_DENIED",
    "INVALID_FIELD",
    "NATS_PERMISSION",
}


class Transient(Exception):
    """It may work later: the message comes back after `delay` seconds."""

    def __init__(self, delay):
        self.delay = min(max(delay, 0), LONGEST_DELAY)


class Poison(Exception):
    """It will never work: the message never comes back."""


def connect(addresses):
    """A channel to `host:port`, `dns:///name:port`, or several addresses with commas between."""
    balance = {"loadBalancingConfig": [{"round_robin": {}}]}
    options = {
        "grpc.max_receive_message_length": MAX_BYTES + (1 << 20),
        "grpc.keepalive_time_ms": 30_000,
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.service_config": json.dumps(balance),
    }
    target = f"ipv4:{addresses}" if "," in addresses else addresses
    return grpc.aio.insecure_channel(target, options=list(options.items()))


def refusal(error):
    """The reason of a failed call, or the name of its code; and what RetryInfo says, if anything."""
    reason, delay = error.code().name, None
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == "fetchproxy":
            reason = info.reason
        if detail.Unpack(retry):
            delay = seconds(retry.retry_delay)
    return reason, delay


class Backoff:
    """Waits before a call is repeated: as long as was asked for, else longer each time."""

    def __init__(self, say):
        self.say, self.tries = say, 0

    def next(self, reason, asked):
        longest = min(PATIENCE, 0.1 * 2**self.tries)
        self.tries += 1
        wait = min(PATIENCE, asked or 0) + random.uniform(longest / 2, longest)
        self.say({"event": "retry", "reason": reason, "in": round(wait, 3)})
        return wait


async def fetch(service, request, stop, say):
    """An answer, however often it must be asked for; None when `stop` is set first."""
    backoff = Backoff(say)
    while not stop.is_set():
        call = service.Fetch(request, timeout=seconds(request.max_wait) + 5)
        try:
            return await unless(stop, call)
        except grpc.aio.AioRpcError as error:
            if error.code() in HOPELESS:
                raise
            await unless(stop, asyncio.sleep(backoff.next(*refusal(error))))
    return None


async def unless(stop, awaitable):
    """What is awaited; or None, having cancelled it, when `stop` is set first."""
    wanted, stopped = asyncio.ensure_future(awaitable), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({wanted, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return await wanted if wanted.done() else None
    finally:
        wanted.cancel()
        stopped.cancel()


@dataclass
class Lease:
    message: object
    ends: float
    length: float
    outcome: object = None
    event: dict = None
    over: bool = False

    def left(self):
        return 0.0 if self.over else self.ends - time.monotonic()


class Batch:
    """Messages in hand. While it is open, every lease that has no outcome yet is extended at a third
    of what is left of the shortest."""

    def __init__(self, service, messages, say):
        now = time.monotonic()
        self.service, self.say = service, say
        self.leases = [Lease(m, now + seconds(m.lease), seconds(m.lease)) for m in messages]
        self.ready = []

    async def __aenter__(self):
        self.heart = asyncio.create_task(self.beat())
        return self

    async def __aexit__(self, *_):
        self.heart.cancel()

    def __iter__(self):
        return iter(self.leases)

    async def beat(self):
        while held := [lease for lease in self.leases if not lease.outcome and not lease.over]:
            await asyncio.sleep(max(0.05, min(lease.left() for lease in held) / 3))
            held = [lease for lease in held if not lease.outcome]
            if held:
                await self.extend(held)

    async def extend(self, held):
        asked = [duration(max(1.0, lease.length)) for lease in held]
        settlements = [
            pb.Settlement(token=lease.message.token, extend=pb.ExtendAction(lease=length))
            for lease, length in zip(held, asked)
        ]
        began = time.monotonic()
        try:
            answer = await self.service.Settle(
                pb.SettleRequest(settlements=settlements), timeout=SETTLE_TIMEOUT
            )
        except grpc.aio.AioRpcError:
            return  # The next beat tries again, and comes sooner.
        for lease, result in zip(held, answer.results):
            if result.outcome == pb.OUTCOME_EXTENDED:
                lease.ends = began + seconds(result.lease)
            elif result.error.reason in LOST and not lease.outcome:
                lease.over = True

    def decide(self, lease, event, **action):
        """Notes what is to become of a message; `settle` does it."""
        lease.outcome = pb.Settlement(token=lease.message.token, **action)
        lease.event = event
        self.ready.append((time.monotonic(), lease))

    def due(self):
        """Whether an outcome has waited so long that it should not wait for others."""
        return bool(self.ready) and time.monotonic() - self.ready[0][0] >= 0.1

    async def settle(self):
        """Settles what was decided. Repeats with the same tokens, which harms nobody, while the
        leases last."""
        open_, self.ready = [lease for _, lease in self.ready], []
        backoff = Backoff(self.say)
        while open_:
            again, why = await self.try_to_settle(open_)
            open_ = []
            for lease in again:
                open_.append(lease) if lease.left() > 0 else self.lose(lease)
            if open_:
                await asyncio.sleep(backoff.next(*why))

    async def try_to_settle(self, leases):
        """What must be repeated, and why."""
        request = pb.SettleRequest(settlements=[lease.outcome for lease in leases])
        try:
            answer = await self.service.Settle(request, timeout=SETTLE_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            why = refusal(error)
            if why[0] not in LOST:
                return leases, why
            for lease in leases:
                self.lose(lease)
            return [], why
        again, why = [], ("", None)
        for lease, result in zip(leases, answer.results):
            if not result.HasField("error"):
                self.say(lease.event)  # Also where it was settled so before: OUTCOME_DUPLICATE.
            elif result.error.reason in LOST:
                self.lose(lease)
            else:
                again.append(lease)
                why = result.error.reason, seconds(result.error.retry_delay)
        return again, why

    def lose(self, lease):
        self.say({**lease.event, "event": "lost"})


def seconds(length):
    return length.seconds + length.nanos / 1e9


def duration(length):
    return Duration(seconds=int(length), nanos=int(length % 1 * 1e9))
