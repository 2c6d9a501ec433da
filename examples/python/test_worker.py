"""A unit test of the worker, with a proxy in memory."""

import asyncio

from fetchproxy import Worker
from fetchproxy.testing import FakeProxy, Settled

from worker import Task, handle


def test_each_kind_of_task_is_settled() -> None:
    """`flaky` is done at its second attempt."""

    async def run() -> None:
        async with FakeProxy() as fake:
            ok = fake.publish({"id": 1, "kind": "ok"})
            flaky = fake.publish({"id": 2, "kind": "flaky"})
            broken = fake.publish({"id": 3, "kind": "broken"})
            await fake.run(Worker(fake.client, "TASKS", "batch-worker", handle, decode=Task))
        assert ok.settlements == [Settled("ack", attempt=1)]
        assert flaky.settlements == [Settled("nak", attempt=1, delay=1), Settled("ack", attempt=2)]
        assert broken.settlements[0].reason == "task 3 can never be done"

    asyncio.run(run())
