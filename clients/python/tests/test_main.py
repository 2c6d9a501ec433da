"""A whole program: it runs until a signal, and logs by the standard logger."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support import in_time

from fetchproxy.testing import FakeProxy, Settled

PROGRAM = """
import sys, time
from fetchproxy import Client, Worker

def handle(message):
    print("begun", message.data, flush=True)
    time.sleep(float(sys.argv[2]))

Worker(Client(sys.argv[1]), "TASKS", "workers", handle, mode=sys.argv[3]).main()
print("ended", flush=True)
"""


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout
    return (await process.stdout.readline()).decode().strip()


@pytest.mark.parametrize("mode", ["consume", "fetch"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@in_time
async def test_signal_ends_a_program_when_its_handlers_have_ended(mode: str, number: int) -> None:
    async with FakeProxy() as fake:
        record = fake.publish("7")
        async with program(fake.address, "0.5", mode) as process:
            assert await line(process) == "begun 7"
            process.send_signal(number)
            assert await line(process) == "ended"
            assert await process.wait() == 0
    assert record.settlements == [Settled("ack", attempt=1)]


@in_time
async def test_second_signal_ends_a_program_although_its_thread_hangs() -> None:
    async with FakeProxy() as fake:
        record = fake.publish("7")
        async with program(fake.address, "600", "consume") as process:
            assert await line(process) == "begun 7"
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert await line(process) == "ended"
            assert await process.wait() == 0
    assert record.settlements == [Settled("nak", attempt=1)]


@in_time
async def test_program_that_is_refused_fails() -> None:
    async with FakeProxy() as fake:
        fake.fail("Consume", "UNAUTHENTICATED")
        async with program(fake.address, "0", "consume") as process:
            _, errors = await process.communicate()
            assert process.returncode == 1
    assert "FetchProxyError: UNAUTHENTICATED" in errors.decode()


@in_time
async def test_warnings_are_logged() -> None:
    async with FakeProxy() as fake:
        fake.publish("{")
        fake.fail("Consume", "NATS_UNAVAILABLE")
        async with program(fake.address, "0", "consume") as process:
            await fake.settled()
            process.terminate()
            _, errors = await process.communicate()
    assert "NATS_UNAVAILABLE" in errors.decode()
    assert "message 1 is rejected: not readable" in errors.decode()
