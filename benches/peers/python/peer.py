"""Does the work of one mode for each line that it reads, for the bench that compares native clients.

A line is: MODE CONSUMER WORKERS MESSAGES. The answer is: done COUNT. All workers of a kind share one connection.
"""

import asyncio
import os
import sys

import grpc
import nats
from fetchproxy import Client, Worker
from fetchproxy.v1 import fetch_pb2 as pb
from fetchproxy.v1 import fetch_pb2_grpc
from google.protobuf.duration_pb2 import Duration

STREAM = os.environ["STREAM"]
WAIT = Duration(seconds=1)


def native(js, consumer, n):
    """Returns the loop of a worker that fetches n messages and confirms each, all acks at once."""

    async def worker(done, messages):
        # Subscriptions share nothing, so that no worker takes the messages of another.
        subscription = await js.pull_subscribe_bind(consumer, STREAM)
        while done[0] < messages:
            try:
                batch = await subscription.fetch(n, timeout=WAIT.seconds)
            except nats.errors.TimeoutError:
                continue
            await asyncio.gather(*(message.ack_sync() for message in batch))
            done[0] += len(batch)
        await subscription.unsubscribe()

    return worker


def proxied(stub, consumer, n):
    """Returns the loop of a worker. One message is acked by an Ack, more by a Settle."""
    request = pb.FetchRequest(stream=STREAM, consumer=consumer, n=n, max_wait=WAIT)

    async def worker(done, messages):
        while done[0] < messages:
            batch = (await stub.Fetch(request)).messages
            if n == 1:
                for message in batch:
                    await stub.Ack(pb.AckRequest(token=message.token))
            elif batch:
                ack = pb.AckAction()
                settlements = [pb.Settlement(token=each.token, ack=ack) for each in batch]
                settled = await stub.Settle(pb.SettleRequest(settlements=settlements))
                assert settled.failed == 0
            done[0] += len(batch)

    return worker


async def packaged(client, consumer, concurrency, messages):
    """Runs a worker of the client package until so many messages are acked. Returns their number."""
    done = 0

    async def handle(message):
        nonlocal done
        done += 1
        if done == messages:
            worker.stop()

    worker = Worker(client, STREAM, consumer, handle, concurrency=concurrency, decode="bytes")
    await worker.run()
    return done


async def main():
    connection = await nats.connect(os.environ["NATS_URL"])
    js = connection.jetstream()
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(os.environ["FETCH_PROXY_ADDR"]) as channel:
        stub = fetch_pb2_grpc.FetchServiceStub(channel)
        client = Client(os.environ["FETCH_PROXY_ADDR"])
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            mode, consumer, workers, messages = line.split()
            kind, n = mode.split("-")
            if kind == "package":
                print("done", await packaged(client, consumer, int(n), int(messages)), flush=True)
                continue
            on, make = (js, native) if kind == "native" else (stub, proxied)
            worker, done = make(on, consumer, int(n)), [0]
            await asyncio.gather(*(worker(done, int(messages)) for _ in range(int(workers))))
            print("done", done[0], flush=True)
        await client.close()
    await connection.close()


asyncio.run(main())
