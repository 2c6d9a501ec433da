"""The part of a worker around the generated client: the channel, the meaning of a refusal, repeats,
log lines, and a batch whose leases are kept alive. Copy it. It must know nothing of the work."""

import asyncio
import json
import os
import random
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
from fetchproxy_pb.v1 import fetch_pb2 as pb
from fetchproxy_pb.v1.fetch_pb2_grpc import FetchServiceStub
from google.rpc import error_details_pb2
from grpc_status import rpc_status

# The largest answer, in bytes. The library's own limit is 4 MiB: raise both together.
MAX_BYTES = 16 << 20
# The longest delay of a Nak, in seconds. A longer delay would fail the whole call.
LONGEST_DELAY = 24 * 3600
# The longest wait before a call is repeated, in seconds. The proxy can ask for as much again.
LONGEST_WAIT = 5
# With these codes a repeat does not help: a person must look.
HOPELESS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


class Transient(Exception):
    """It may work later: the message comes back after `delay` seconds."""

    def __init__(self, delay):
        self.delay = min(max(0, delay), LONGEST_DELAY)


class Poison(Exception):
    """It will never work: the message never comes back."""


class Proxy:
    """The proxy at `host:port`, at `https://host:port` with TLS, or at all addresses of a
    `dns:///name:port`. The files of credentials are read for each call: the next call has the new
    token, and a new certificate makes a new channel."""

    def __init__(self, address):
        self.target = address.removeprefix("https://")
        self.tls = self.target != address
        self.files = self.channel = None
        host = self.target.removeprefix("dns:///")
        local = host.startswith(("localhost:", "127.0.0.1:", "[::1]:"))
        if content("BEARER_FILE") and not (self.tls or local):
            sys.exit(f"a credential is not sent to {address} without TLS: use https://")

    def call(self, method, request, timeout):
        return self.method(method)(request, timeout=timeout, metadata=self.metadata())

    def stream(self, method):
        return self.method(method)(metadata=self.metadata())

    def method(self, name):
        files = [content("CA"), content("KEY"), content("CERT")]
        if files != self.files:
            if self.channel:
                asyncio.ensure_future(self.channel.close(20))  # Open calls may end.
            self.files, self.channel = files, connect(self.target, self.tls and files)
        return getattr(FetchServiceStub(self.channel), name)

    def metadata(self):
        token = content("BEARER_FILE")
        return [("authorization", f"Bearer {token.decode().strip()}")] if token else []

    async def close(self):
        if self.channel:
            await self.channel.close(20)


def content(name):
    """The content of the file that this variable names, or None."""
    path = os.environ.get(f"FETCH_PROXY_{name}")
    return Path(path).read_bytes() if path else None


def connect(target, files):
    """A channel to all addresses of the target: with TLS if there are `files`."""
    options = {
        "grpc.max_receive_message_length": MAX_BYTES + (1 << 20),
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.service_config": json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}),
    }
    options = list(options.items())
    if not files:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(*files), options)


def refusal(error):
    """The reason of a failed call, or the name of its code; its text; the delay of RetryInfo."""
    reason, delay = error.code().name, 0
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == "fetchproxy":
            reason = info.reason
        if detail.Unpack(retry):
            delay = seconds(retry.retry_delay)
    return reason, error.details(), delay


class Backoff:
    """Waits before a call is repeated: at least as long as asked, and longer each time."""

    tries = 0

    def next(self, reason, message, asked):
        longest = min(LONGEST_WAIT, 0.1 * 2**self.tries)
        self.tries += 1
        wait = min(LONGEST_WAIT, asked) + random.uniform(longest / 2, longest)
        say(line("retry", {"reason": reason, "message": message, "in": round(wait, 3)}))
        return wait


async def fetch(proxy, request, stop):
    """Repeats the call until there is an answer. The repeats have one name, so they get the messages
    of an answer that was lost. Returns None if `stop` is set first."""
    backoff = Backoff()
    request.attempt_id, request.attempt_again = str(uuid.uuid4()), False
    while not stop.is_set():
        soon = time.monotonic() + 0.5
        call = proxy.call("Fetch", request, seconds(request.max_wait) + 5)
        try:
            answer = await unless(stop, call)
        except grpc.aio.AioRpcError as error:
            if error.code() in HOPELESS:
                raise
            request.attempt_again = True
            await unless(stop, asyncio.sleep(backoff.next(*refusal(error))))
            continue
        if not answer:
            break
        if not answer.messages and not answer.rejected:
            await unless(stop, asyncio.sleep(soon - time.monotonic()))
        return answer
    await give_back(proxy, request)


async def give_back(proxy, request):
    """Returns the messages of a Fetch whose answer nobody reads. If it fails, they come back when
    their leases end."""
    names = {"stream": request.stream, "consumer": request.consumer}
    try:
        await proxy.call("GiveBack", pb.GiveBackRequest(attempt_id=request.attempt_id, **names), 1)
    except grpc.aio.AioRpcError as error:
        print(f"the last Fetch is not given back: {refusal(error)}", file=sys.stderr)


async def unless(event, awaitable):
    """The result of `awaitable`. If `event` is set first, cancels it and returns None."""
    wanted, happened = asyncio.ensure_future(awaitable), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({wanted, happened}, return_when=asyncio.FIRST_COMPLETED)
        return await wanted if wanted.done() else None
    finally:
        wanted.cancel()
        happened.cancel()


@dataclass
class Outcome:
    """How a message is settled, and what the log line says of it."""

    event: str
    action: dict  # The action of a pb.Settlement, by its name.
    told: dict = None


def ack(told=None):
    return Outcome("acked", {"ack": pb.AckAction()}, told)


def nak(delay, event="nacked"):
    return Outcome(event, {"nak": pb.NakAction(delay=timedelta(seconds=delay))})


def term(reason):
    reason = reason.encode(errors="replace")[:1024].decode(errors="ignore")
    return Outcome("termed", {"term": pb.TermAction(reason=reason)})


def reject(rejected):
    """Tells of a rejected message. Without a token it is over, otherwise this is its outcome."""
    print(f"message {rejected.stream_sequence}: {rejected.detail}", file=sys.stderr)
    say(line("rejected", about(rejected)))
    if rejected.cause == pb.REJECTED_CAUSE_TOO_LARGE:
        return nak(60)  # Another worker may accept larger answers.
    return term(rejected.detail)


@dataclass
class Lease:
    """A message that is ours until it is `gone`: settled or lost."""

    message: object
    length: float  # The length that was granted, in seconds.
    begun: bool = False
    outcome: object = None
    said: str = None  # The log line at the end.
    fresh: bool = False  # Decided and not sent yet.
    gone: bool = False

    def __post_init__(self):
        self.renew(time.monotonic(), self.length)

    def renew(self, since, length):
        now, self.ends = time.monotonic(), since + length
        if not self.fresh:  # The latest time at which a call must include it.
            self.due = now + max(0.05, (self.ends - now) / 3)

    def settlement(self):
        # Without a length, the lease lasts as long as it was granted.
        extension = pb.Settlement(token=self.message.token, extend=pb.ExtendAction())
        return self.outcome or extension


class Batch:
    """The messages of a Fetch. One task, the keeper, runs until every lease is gone. Only the
    keeper settles and extends, so no outcome waits for a slow message. `stop` gives back at once
    all messages that are not begun."""

    def __init__(self, proxy, answer, stop):
        self.proxy, self.stop, self.news = proxy, stop, asyncio.Event()
        self.leases = [Lease(message, seconds(message.lease)) for message in answer.messages]
        self.backoff = Backoff()
        for rejected in answer.rejected:
            outcome = reject(rejected)
            if rejected.token:  # The message is still leased to us.
                self.leases.append(Lease(rejected, seconds(rejected.lease)))
                self.decide(self.leases[-1], outcome)

    async def __aenter__(self):
        self.keeper = asyncio.create_task(self.keep())
        self.returner = asyncio.create_task(self.give_back())
        return self

    async def __aexit__(self, failure, *_):
        if not failure:
            await self.keeper
        self.keeper.cancel()
        self.returner.cancel()

    async def __aiter__(self):
        """The messages to work on, one after the other, as long as they are still ours."""
        for lease in self.leases:
            await asyncio.sleep(0)  # Lets the keeper run, even if the work never waits.
            if not lease.gone and not lease.outcome and lease.ends > time.monotonic():
                lease.begun = True
                yield lease

    async def give_back(self):
        await self.stop.wait()
        for lease in self.leases:
            waits = not (lease.begun or lease.outcome or lease.gone)
            # A Nak of the last attempt would end the message.
            if waits and not 0 < lease.message.max_deliver <= lease.message.delivery_count:
                self.decide(lease, nak(0, "returned"))

    def decide(self, lease, outcome):
        """Notes the outcome of a message and its log line. The keeper settles the message soon. It may
        wait a moment, so that other outcomes go in the same call."""
        lease.said = line(outcome.event, about(lease.message), outcome.told)
        lease.outcome = pb.Settlement(token=lease.message.token, **outcome.action)
        last = all(other.outcome or other.gone for other in self.leases)
        lease.fresh, lease.due = True, time.monotonic() + (0 if last else 0.1)
        self.news.set()

    async def keep(self):
        while left := [lease for lease in self.leases if not lease.gone]:
            self.news.clear()
            now = time.monotonic()
            if (wait := min(lease.due for lease in left) - now) > 0:
                await unless(self.news, asyncio.sleep(wait))
                continue
            for lease in left:
                if lease.ends <= now:
                    self.lose(lease, "its time is over")
            if due := [one for one in left if not one.gone and (one.fresh or one.due <= now)]:
                await self.settle(due)

    async def settle(self, leases):
        """One call for all of them. They are never more than 1000, because a Fetch brings no more.
        A repeat with the same tokens harms nobody."""
        request = pb.SettleRequest(settlements=[lease.settlement() for lease in leases])
        for lease in leases:
            lease.fresh = False
        began = time.monotonic()
        left = min(lease.ends for lease in leases) - began
        try:
            answer = await self.proxy.call("Settle", request, min(max(1, left / 2), 10))
            results = answer.results
        except grpc.aio.AioRpcError as error:
            if error.code() not in HOPELESS:
                await asyncio.sleep(self.backoff.next(*refusal(error)))
                return
            reason, message, _ = refusal(error)
            failed = pb.SettleError(reason=reason, message=message)
            results = [pb.SettleResult(error=failed)] * len(leases)
        again = []
        for lease, result in zip(leases, results):
            error = result.error
            if error.HasField("retry_delay") or error.reason == "SETTLE_UNCONFIRMED":
                again.append((lease, error))
            elif error.reason:
                self.lose(lease, f"{error.reason}: {error.message}")
            elif result.outcome != pb.OUTCOME_EXTENDED:
                self.end(lease, lease.said)  # This includes OUTCOME_DUPLICATE.
            else:
                lease.renew(began, seconds(result.lease))
        if not again:
            self.backoff.tries = 0
            return
        asked = max(seconds(error.retry_delay) for _, error in again)
        wait = self.backoff.next(again[0][1].reason, again[0][1].message, asked)
        for lease, _ in again:
            lease.due = lease.due if lease.fresh else time.monotonic() + wait

    def lose(self, lease, why):
        print(f"message {lease.message.stream_sequence} is lost: {why}", file=sys.stderr)
        self.end(lease, line("lost", about(lease.message)))

    def end(self, lease, said):
        lease.gone = True
        if isinstance(lease.message, pb.Delivery):  # The others have their log line already.
            say(said)


def about(message):
    """The fields of every log line about a message."""
    try:
        id_ = json.loads(message.text)["id"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        id_ = None
    sequence, deliveries = message.stream_sequence, message.delivery_count
    return {"sequence": sequence, "deliveries": deliveries, "id": id_}


def line(event, about=None, told=None):
    return json.dumps({"event": event, **(about or {}), **(told or {})})


def say(text):
    print(text, flush=True)


def seconds(length):
    return length.ToTimedelta().total_seconds()
