"""The small parts: options, decoders, waits, limits of the contract, threads."""

import asyncio
import re
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support import Events, in_time, worker

import fetchproxy
from fetchproxy import Client, Nak, Settlement, Worker
from fetchproxy.backoff import Backoff
from fetchproxy.contract import term_of
from fetchproxy.decode import decoder
from fetchproxy.errors import REASONS
from fetchproxy.outcome import of_error, of_result
from fetchproxy.testing import FakeProxy, Settled
from fetchproxy.threads import Threads
from fetchproxy.v1 import fetch_pb2 as pb

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("concurrency", 0),
        ("concurrency", 1001),
        ("mode", "pull"),
        ("batch", 0),
        ("batch", 1001),
        ("max_wait", -1),
        ("max_wait", 301),
        ("lease", 0.5),
        ("grace", 0.9),
        ("grace", 181),
        ("max_bytes", 1023),
        ("max_bytes", (64 << 20) + 1),
        ("at_most", 0.5),
        ("stop_timeout", -1),
        ("name", "x" * 1025),
    ],
)
def test_option_out_of_its_range_is_refused(option: str, value: object) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=option):
        Worker(Client("127.0.0.1:1"), "TASKS", "workers", print, **options)


def test_decoder_that_is_none_is_refused() -> None:
    wrong: Any = "xml"
    with pytest.raises(TypeError, match="decode is 'xml'"):
        Worker(Client("127.0.0.1:1"), "TASKS", "workers", print, decode=wrong)


def test_stream_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        Worker(Client("127.0.0.1:1"), "", "workers", print)


class Model:
    """As pydantic has it."""

    @staticmethod
    def model_validate_json(payload: bytes) -> str:
        return f"model of {payload.decode()}"


@pytest.mark.parametrize(
    ("decode", "codec", "data"),
    [
        ("json", pb.CODEC_JSON, 7),
        ("text", pb.CODEC_TEXT, "7"),
        ("bytes", pb.CODEC_RAW, b"7"),
        (float, pb.CODEC_RAW, 7.0),
        (Model, pb.CODEC_JSON, "model of 7"),
    ],
)
def test_decoder_has_its_codec(decode: Any, codec: int, data: object) -> None:
    function, wire = decoder(decode)
    assert (wire, function(b"7")) == (codec, data)


def test_waits_grow_and_are_at_least_as_long_as_asked() -> None:
    backoff = Backoff()
    waits = [backoff.next() for _ in range(12)]
    for wait, longest in zip(waits, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5, 5, 5], strict=True):
        assert longest / 2 <= wait <= longest
    backoff.reset()
    assert 1 <= backoff.next(1.0) <= 1.1
    assert backoff.next(60.0) <= 5.2


def test_values_that_would_fail_a_whole_call_are_lowered() -> None:
    assert Settlement.nak("t", 1e9).message.nak.delay.seconds == 24 * 3600
    assert Settlement.nak("t", -1).message.nak.delay.seconds == 0
    reason = term_of("ä" * 600 + "\ud800").reason
    assert (len(reason.encode()), set(reason)) == (1024, {"ä"})
    assert term_of("lone \ud800").reason == "lone ?"
    for attempt in (0, 1, 7, 10_000):
        action = of_error(attempt).action
        assert isinstance(action, pb.NakAction)
        assert 5 <= action.delay.seconds <= 300


def test_delay_may_be_a_timedelta() -> None:
    action = of_result(Nak(timedelta(minutes=2))).action
    assert isinstance(action, pb.NakAction)
    assert action.delay.seconds == 120


def test_reasons_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Za-z]+) \|", page, re.MULTILINE)
    documented = {name: code for name, code in rows if not name.startswith("EMPTY_")}
    known = {name: code.name.replace("_", "").lower() for name, code in REASONS.items()}
    assert known == {name: code.lower() for name, code in documented.items()}


def test_version_is_that_of_the_server() -> None:
    pattern = r'^version = "(.*)"$'
    manifests = (ROOT / "Cargo.toml", ROOT / "clients/python/pyproject.toml")
    server, package = (
        re.findall(pattern, manifest.read_text(), re.MULTILINE)[0] for manifest in manifests
    )
    assert server == package
    assert f"## {package}" in (ROOT / "clients/python/CHANGELOG.md").read_text()


def test_all_public_names_have_a_docstring() -> None:
    for name in fetchproxy.__all__:
        assert getattr(fetchproxy, name).__doc__ or name == "Effect", name


@in_time
async def test_frame_of_long_reasons_stays_below_its_limit() -> None:
    """600 Terms of 1 KiB are more than the 512 KiB of a frame."""
    most = 600
    meet = asyncio.Event()
    begun = 0

    async def handle(_: object) -> fetchproxy.Term:
        nonlocal begun
        begun += 1
        if begun == most:
            meet.set()
        await meet.wait()
        return fetchproxy.Term("x" * 1024)

    events = Events()
    async with FakeProxy() as fake:
        for number in range(most):
            fake.publish(number)
        await fake.run(worker(fake.client, handle, concurrency=most, on_event=events))
    sizes = [frame.ByteSize() for frame in fake.requests]
    assert max(sizes) < 512 << 10
    assert sum(sizes) > most << 10
    assert events.names.count("termed") == most


@in_time
async def test_threads_are_as_few_as_needed() -> None:
    threads, before = Threads(3), threading.active_count()
    assert [await threads.run(lambda: 7) for _ in range(5)] == [7] * 5
    assert threading.active_count() == before + 1
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(next, iter(()))
    threads.end()


@in_time
async def test_worker_runs_once() -> None:
    async with FakeProxy() as fake:
        record = fake.publish(1)
        one = worker(fake.client, lambda _: None)
        await fake.run(one)
        with pytest.raises(RuntimeError, match="runs once"):
            await one.run()
    assert record.settlements == [Settled("ack", attempt=1)]
