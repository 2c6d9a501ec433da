"""The loop with Consume: messages come and outcomes go on one stream, and many handlers run at once.
Copy it. It must know nothing of the work."""

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

import grpc
from fetchproxy_pb.v1 import fetch_pb2 as pb

from fetchproxy import HOPELESS, Backoff, about, line, refusal, reject, say, seconds, unless

# A stream without a frame for so many heartbeats is dead. So is a worker.
MISSED_BEATS = 3
# The shortest heartbeat and the shortest lease that the proxy allows, in seconds.
SHORTEST = 1
# A frame with more settlements is refused.
MOST_SETTLEMENTS = 1000


async def consume(proxy, start, grace, work, stop):
    """Works on as many messages at once as `start` has credit for. Returns when `stop` is set and
    every message is settled. If the worker dies, others get its messages after `grace` seconds.
    `work` returns the outcome of a message. It is cancelled when the lease is lost."""
    grace = max(grace, SHORTEST)
    beat = max(grace / MISSED_BEATS, SHORTEST)
    start.heartbeat.FromTimedelta(timedelta(seconds=beat))
    start.keep.grace.FromTimedelta(timedelta(seconds=grace))
    consumer = Consumer(proxy, start, grace, beat, work, stop)
    consumer.current = Stream(consumer)
    backoff, streams = Backoff(), set()
    while True:
        stream = consumer.current
        streams.add(asyncio.create_task(stream.run()))
        await stream.leaves.wait()
        if not stream.ended:  # It drains. The next stream takes over, and this one ends by itself.
            continue
        if stop.is_set():
            await asyncio.wait(streams)
            if not consumer.held:
                return
        streams = {task for task in streams if not task.done()}
        if stream.opened:
            backoff.tries = 0
        if not (error := stream.error):
            continue
        if stream.opened and error.code() == grpc.StatusCode.UNAUTHENTICATED:
            continue  # The file may have a newer credential.
        if error.code() in HOPELESS:
            for held in list(consumer.held):
                held.lose(refusal(error)[:2])
            raise error
        pause = asyncio.sleep(backoff.next(*refusal(error)))
        await (pause if stop.is_set() else unless(stop, pause))


@dataclass
class Consumer:
    """The messages in hand, and the stream that is open, or will be next."""

    proxy: object
    start: object
    grace: float
    beat: float
    work: object
    stop: asyncio.Event
    current: object = None
    held: set = field(default_factory=set)


@dataclass(eq=False)
class Held:
    """A message in hand."""

    message: object
    stream: object  # Carries the settlement.
    number: int  # The name of the message on this stream. 0: it came by an earlier stream.
    task: object = None
    outcome: object = None
    gone: bool = False  # Settled or lost.

    async def run(self, work):
        outcome = await work(self.message)
        self.decide(outcome)

    def decide(self, outcome):
        self.outcome = outcome
        self.send()

    def send(self):
        """Puts the message into the next frame."""
        if not self.gone:
            self.stream.ready.add(self)
            self.stream.wake.set()

    def settlement(self, grace):
        """The outcome, or an Extend if there is no outcome."""
        name = {"number": self.number} if self.number else {"token": self.message.token}
        if self.outcome:
            return pb.Settlement(**self.outcome.action, **name)
        return pb.Settlement(extend=pb.ExtendAction(lease=timedelta(seconds=grace)), **name)

    def lose(self, why):
        if not self.gone:
            print(f"message {self.message.stream_sequence} is lost: {why}", file=sys.stderr)
            self.end("lost")

    def end(self, event, told=None):
        if self.gone:
            return
        self.gone = True
        self.stream.consumer.held.discard(self)
        self.stream.ready.discard(self)
        self.stream.wake.set()
        if self.task:
            self.task.cancel()
        if isinstance(self.message, pb.Delivery):  # The others have their log line already.
            say(line(event, about(self.message), told))


class Stream:
    """One call of Consume. One task reads, another writes."""

    def __init__(self, consumer):
        self.consumer = consumer
        self.wake = asyncio.Event()  # There is something to write.
        self.leaves = asyncio.Event()  # It drains, or has ended.
        self.opened = self.ended = False
        self.error = None  # Why it has ended. None: an orderly end.
        self.pausing = self.paused = False  # The credit is to be 0; no message comes any more.
        self.ready = set()  # To be settled or extended in the next frame.
        self.sent = {}  # Without a result yet, by the id of the frame.
        self.last_id = 0
        self.backoff = Backoff()

    async def run(self):
        reader = asyncio.ensure_future(self.read())
        stopper = asyncio.ensure_future(self.on_stop(reader))
        try:
            await reader
        except grpc.aio.AioRpcError as error:
            self.error = error
        except asyncio.CancelledError:
            pass  # By `stop`, before the proxy served it.
        finally:
            stopper.cancel()
            self.hand_over()

    async def on_stop(self, reader):
        await self.consumer.stop.wait()
        if not self.opened and not self.consumer.held:
            reader.cancel()
        self.wake.set()

    async def read(self):
        call = self.consumer.proxy.stream("Consume")
        writer = asyncio.create_task(self.write(call))
        silence = MISSED_BEATS * self.consumer.beat
        try:
            while (frame := await asyncio.wait_for(call.read(), silence)) is not grpc.aio.EOF:
                self.take(frame)
        except asyncio.TimeoutError:
            raise aborted(f"no frame for {silence} s") from None
        finally:
            writer.cancel()
            call.cancel()

    async def write(self, call):
        """Sends a frame when there is something to say, and with each heartbeat."""
        next_beat = time.monotonic() + self.consumer.beat
        # The reader has the reason of an error.
        with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            frame = self.frame()
            frame.start.CopyFrom(self.consumer.start)
            await call.write(frame)
            while not self.is_done():
                await unless(self.wake, asyncio.sleep(next_beat - time.monotonic()))
                self.wake.clear()
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self.consumer.beat
                    self.extend()
                await call.write(self.frame())
            await call.done_writing()

    def frame(self):
        """All that is there to say: as many settlements as fit, or nothing, as a sign of life."""
        frame = pb.ConsumeRequest()
        if self.consumer.stop.is_set() and not self.pausing:
            self.pausing = True
            frame.credit.CopyFrom(pb.ConsumeCredit(id=1, max_leases=0))
        if parts := list(self.ready)[:MOST_SETTLEMENTS]:
            self.ready.difference_update(parts)
            self.last_id += 1
            self.sent[self.last_id] = parts
            frame.settle.id = self.last_id
            frame.settle.settlements.extend(held.settlement(self.consumer.grace) for held in parts)
        if self.ready:
            self.wake.set()
        return frame

    def is_done(self):
        """The worker stops, and this stream has nothing more to settle."""
        return self.pausing and self.paused and not self.holds()

    def holds(self):
        return [held for held in self.consumer.held if held.stream is self]

    def extend(self):
        """Renews the leases that have outlived their stream. The proxy keeps the others."""
        for held in self.holds():
            if not held.number and not held.outcome:
                held.send()

    def take(self, frame):
        self.opened = True
        for message in frame.messages:
            held = self.hold(message)
            held.task = asyncio.create_task(held.run(self.consumer.work))
        for rejected in frame.rejected:
            outcome = reject(rejected)
            if rejected.token:
                self.hold(rejected).decide(outcome)
        for result in frame.results:
            self.settled(result)
        for ended in frame.ended:
            for held in self.holds():
                if held.number == ended.number:
                    held.lose(f"{ended.why.reason}: {ended.why.message}")
        if frame.HasField("draining"):
            self.consumer.current = Stream(self.consumer)
            self.leaves.set()
        if frame.credit_id:
            self.paused = True
            self.wake.set()

    def hold(self, message):
        held = Held(message, self, message.number)
        self.consumer.held.add(held)
        return held

    def settled(self, result):
        """Takes the results of one frame."""
        again = []
        for place, held in enumerate(self.sent.pop(result.id)):
            one = pb.SettleResult() if result.HasField("error") else result.results[place]
            error = result.error if result.HasField("error") else one.error
            if error.HasField("retry_delay") or error.reason == "SETTLE_UNCONFIRMED":
                again.append((held, error))
            elif error.reason:
                held.lose(f"{error.reason}: {error.message}")
            elif one.outcome != pb.OUTCOME_EXTENDED:
                held.end(held.outcome.event, held.outcome.told)
        if not again:
            self.backoff.tries = 0
            return
        _, error = max(again, key=lambda part: seconds(part[1].retry_delay))
        wait = self.backoff.next(error.reason, error.message, seconds(error.retry_delay))
        for held, _ in again:
            asyncio.get_running_loop().call_later(wait, held.send)

    def hand_over(self):
        """What is left goes to the next stream: it is settled there by token, or extended."""
        if self.consumer.current is self:
            self.consumer.current = Stream(self.consumer)
        for held in self.holds():
            held.stream, held.number = self.consumer.current, 0
            held.send()
        self.ended = True
        self.leaves.set()


def aborted(message):
    """The error of a call that this side gives up."""
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, nothing, nothing, message)
