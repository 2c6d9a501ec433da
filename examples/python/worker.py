"""A worker: fetches a batch, handles one message after the other, settles what became of them.

Copy it, and put your work into `handle`."""

import asyncio
import json
import os
import signal
import sys

import grpc
from fetchproxy_pb.v1 import fetch_pb2 as pb
from fetchproxy_pb.v1.fetch_pb2_grpc import FetchServiceStub

import fetchproxy
from fetchproxy import Poison, Transient


async def handle(message):
    """The work. What it raises decides what becomes of the message."""
    task = json.loads(message.text)
    match task["do"]:
        case "fail" if message.delivery_count <= task["times"]:
            raise Transient(task["delay"])
        case "poison":
            raise Poison(f"task {task['id']} can never be done")
        case "slow":
            await asyncio.sleep(task["seconds"])
        case "headers":
            return {"headers": {name: list(h.values) for name, h in message.headers.items()}}
    return {}


async def main():
    stop = asyncio.Event()
    for number in signal.SIGTERM, signal.SIGINT:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    request = pb.FetchRequest(
        stream=os.environ["STREAM"],
        consumer=os.environ["CONSUMER"],
        n=int(os.environ.get("BATCH", "10")),
        max_wait=fetchproxy.duration(float(os.environ.get("MAX_WAIT", "10"))),
        max_bytes=fetchproxy.MAX_BYTES,
        codec=pb.CODEC_JSON,
        worker="examples/python",
    )
    async with fetchproxy.connect(os.environ.get("FETCH_PROXY_ADDR", "127.0.0.1:50051")) as channel:
        service = FetchServiceStub(channel)
        say({"event": "ready"})
        while answer := await fetchproxy.fetch(service, request, stop, say):
            await work(service, answer, stop)
    say({"event": "stopped"})


async def work(service, answer, stop):
    for rejected in answer.rejected:
        print(f"message {rejected.stream_sequence}: {rejected.detail}", file=sys.stderr)
        say(line("rejected", rejected))
    if answer.empty_reason > pb.EMPTY_REASON_NO_MESSAGES and not answer.rejected:
        await fetchproxy.unless(stop, asyncio.sleep(0.5))
    async with fetchproxy.Batch(service, answer.messages, say) as batch:
        for lease in batch:
            if lease.left() <= 0:
                say(line("lost", lease.message))
            elif stop.is_set():
                batch.decide(lease, line("returned", lease.message), nak=pb.NakAction())
            else:
                await handle_one(batch, lease)
            if batch.due():
                await batch.settle()
        await batch.settle()


async def handle_one(batch, lease):
    message = lease.message
    try:
        told = await handle(message)
        batch.decide(lease, {**line("acked", message), **told}, ack=pb.AckAction())
    except Transient as error:
        again = pb.NakAction(delay=fetchproxy.duration(error.delay))
        batch.decide(lease, line("nacked", message), nak=again)
    except Poison as error:
        batch.decide(lease, line("termed", message), term=pb.TermAction(reason=str(error)))


def line(event, message):
    try:
        id_ = json.loads(message.text)["id"]
    except (AttributeError, KeyError, TypeError, ValueError):
        id_ = None
    sequence, deliveries = message.stream_sequence, message.delivery_count
    return {"event": event, "sequence": sequence, "deliveries": deliveries, "id": id_}


def say(event):
    print(json.dumps(event), flush=True)


try:
    asyncio.run(main())
except grpc.aio.AioRpcError as error:
    sys.exit(f"refused: {fetchproxy.refusal(error)[0]}: {error.details()}")
