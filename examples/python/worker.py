"""A worker. With Fetch, it takes a batch, and handles one message after the other. With Consume, if
CONCURRENCY is set, it handles up to so many messages at once, as they come.

Copy it, and put your work into `handle`."""

import asyncio
import json
import logging
import os
import signal
import sys
from datetime import timedelta

import grpc
from fetchproxy_pb.v1 import fetch_pb2 as pb

import fetchproxy
from consume import consume
from fetchproxy import Batch, Poison, Proxy, Transient, ack, line, nak, say, term

log = logging.getLogger("worker")


async def handle(message):
    """The work. An exception decides how the message is settled. The result is logged."""
    if not message.text:  # A tombstone or a consumer of headers only: nothing to do.
        return None
    try:
        task = json.loads(message.text)
    except (ValueError, RecursionError) as error:
        raise Poison(f"not readable: {error}") from error
    match task:
        case {"do": "ok"}:
            pass
        case {"do": "fail", "times": times, "delay": delay}:
            if message.delivery_count <= times:
                raise Transient(delay)
        case {"do": "poison", "id": id_}:
            raise Poison(f"task {id_} can never be done")
        case {"do": "slow", "seconds": seconds}:
            await asyncio.sleep(seconds)
        case {"do": "headers"}:
            return {"headers": {name: list(h.values) for name, h in message.headers.items()}}
        case _:
            raise Poison("no task that is known here")


async def work(message):
    """The outcome of the work."""
    try:
        return ack(await handle(message))
    except Transient as error:
        return nak(error.delay)
    except Poison as error:
        return term(str(error))
    except (Exception, asyncio.CancelledError):  # Of a task that the work waited for.
        log.exception("message %d", message.stream_sequence)
        return nak(5)


async def main():
    stop = asyncio.Event()
    for number in signal.SIGTERM, signal.SIGINT:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    source = {
        "stream": os.environ["STREAM"],
        "consumer": os.environ["CONSUMER"],
        "codec": pb.CODEC_JSON,
        "worker": "examples/python",
    }
    proxy = Proxy(os.environ.get("FETCH_PROXY_ADDR", "127.0.0.1:50051"))
    say(line("ready"))
    if concurrency := int(os.environ.get("CONCURRENCY", "0")):
        credit = pb.ConsumeCredit(max_leases=concurrency)
        start = pb.ConsumeStart(credit=credit, max_frame_bytes=fetchproxy.MAX_BYTES, **source)
        await consume(proxy, start, float(os.environ.get("GRACE", "10")), work, stop)
    else:
        n = int(os.environ.get("BATCH", "10"))
        wait = timedelta(seconds=float(os.environ.get("MAX_WAIT", "10")))
        size = fetchproxy.MAX_BYTES
        request = pb.FetchRequest(n=n, max_wait=wait, max_bytes=size, **source)
        await fetch_loop(proxy, request, stop)
    await proxy.close()
    say(line("stopped"))


async def fetch_loop(proxy, request, stop):
    while answer := await fetchproxy.fetch(proxy, request, stop):
        async with Batch(proxy, answer, stop) as batch:
            async for lease in batch:
                batch.decide(lease, await work(lease.message))


try:
    asyncio.run(main())
except grpc.aio.AioRpcError as error:
    reason, message, _ = fetchproxy.refusal(error)
    sys.exit(f"refused: {reason}: {message}")
