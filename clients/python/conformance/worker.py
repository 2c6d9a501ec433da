"""The worker of the conformance suite: does what a message says, and prints each event as a line of
JSON. With Consume, if CONCURRENCY is set, it handles up to so many messages at once. Otherwise it takes
a batch with Fetch, and handles one message after the other."""

import asyncio
import json
import os
import sys
from typing import Any

import fetchproxy
from fetchproxy import Client, Message, Nak, Term, Worker


async def handle(message: Message[Any]) -> None:
    """The work. An exception decides how the message is settled."""
    if not message.payload:  # A tombstone or a consumer of headers only: nothing to do.
        return
    match message.data:
        case {"do": "ok" | "headers"}:
            pass
        case {"do": "fail", "times": times, "delay": delay}:
            if message.delivery_count <= times:
                raise Nak(delay)
        case {"do": "poison", "id": id_}:
            raise Term(f"task {id_} can never be done")
        case {"do": "slow", "seconds": seconds}:
            await asyncio.sleep(seconds)
        case _:
            raise Term("no task that is known here")


def tell(event: fetchproxy.Event) -> None:
    """The line of an event. The text for people goes to stderr."""
    told: dict[str, Any] = {"event": event.name}
    match event:
        case fetchproxy.HandlerError():
            fetchproxy.log_event(event)
            return
        case fetchproxy.Retry():
            told.update({"reason": event.reason, "message": event.detail, "in": event.wait})
        case fetchproxy.Rejected():
            told.update(about(event.rejected, None))
        case fetchproxy.MessageEvent():
            told.update(about(event.message, event.message.data))
            if isinstance(event.message.data, dict) and event.message.data.get("do") == "headers":
                told["headers"] = event.message.headers
    fetchproxy.log_event(event)
    print(json.dumps(told), flush=True)


def about(message: Message[Any] | fetchproxy.RejectedMessage, data: object) -> dict[str, Any]:
    """The fields of every line about a message."""
    id_ = data.get("id") if isinstance(data, dict) else None
    sequence, deliveries = message.stream_sequence, message.delivery_count
    return {"sequence": sequence, "deliveries": deliveries, "id": id_}


def worker(client: Client) -> Worker[Any]:
    """The worker as the environment wants it."""
    stream, consumer = os.environ["STREAM"], os.environ["CONSUMER"]
    if concurrency := int(os.environ.get("CONCURRENCY", "0")):
        grace = float(os.environ.get("GRACE", "10"))
        return Worker(
            client, stream, consumer, handle, concurrency=concurrency, grace=grace, on_event=tell
        )
    return Worker(
        client,
        stream,
        consumer,
        handle,
        mode="fetch",
        concurrency=1,
        batch=int(os.environ.get("BATCH", "10")),
        max_wait=float(os.environ.get("MAX_WAIT", "10")),
        on_event=tell,
    )


try:
    worker(Client.from_env()).main()
except (fetchproxy.FetchProxyError, ValueError) as error:
    sys.exit(f"refused: {error}")
