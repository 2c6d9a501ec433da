"""A worker for the samples of `fetch-proxy dev`. Put your own work into `handle`."""

import asyncio
import logging
from dataclasses import dataclass

from fetchproxy import Client, Message, Nak, Term, Worker


@dataclass
class Task:
    """The payload of a message, as JSON."""

    id: int
    kind: str


async def handle(message: Message[Task]) -> None:
    """The work. Its return is an Ack."""
    task = message.data
    if task.kind == "broken":
        raise Term(f"task {task.id} can never be done")
    if task.kind == "flaky" and message.delivery_count == 1:
        raise Nak(delay=1)
    await asyncio.sleep(0.1)
    print("done:", task.id, flush=True)


if __name__ == "__main__":
    logging.basicConfig()
    Worker(Client.from_env(), "TASKS", "batch-worker", handle, decode=Task).main()
