"""A worker: fetches a batch, handles one message after the other, and settles each of them.

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
from fetchproxy import Batch, Poison, Proxy, Transient, line, say

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


async def main():
    stop = asyncio.Event()
    for number in signal.SIGTERM, signal.SIGINT:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    request = pb.FetchRequest(
        stream=os.environ["STREAM"],
        consumer=os.environ["CONSUMER"],
        n=int(os.environ.get("BATCH", "10")),
        max_wait=timedelta(seconds=float(os.environ.get("MAX_WAIT", "10"))),
        max_bytes=fetchproxy.MAX_BYTES,
        codec=pb.CODEC_JSON,
        worker="examples/python",
    )
    proxy = Proxy(os.environ.get("FETCH_PROXY_ADDR", "127.0.0.1:50051"))
    say(line("ready"))
    while answer := await fetchproxy.fetch(proxy, request, stop):
        await work(proxy, answer, stop)
    await proxy.close()
    say(line("stopped"))


async def work(proxy, answer, stop):
    async with Batch(proxy, answer, stop) as batch:
        async for lease in batch:
            try:
                batch.ack(lease, await handle(lease.message))
            except Transient as error:
                batch.nak(lease, error.delay)
            except Poison as error:
                batch.term(lease, str(error))
            except (Exception, asyncio.CancelledError):  # Of a task that the work waited for.
                log.exception("message %d", lease.message.stream_sequence)
                batch.nak(lease, 5)


try:
    asyncio.run(main())
except grpc.aio.AioRpcError as error:
    reason, message, _ = fetchproxy.refusal(error)
    sys.exit(f"refused: {reason}: {message}")
