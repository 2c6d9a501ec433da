"""Single calls: their answers, their errors, and their repeats."""

import asyncio
from pathlib import Path

import grpc
import pytest
from support import in_time

from fetchproxy import Client, FetchProxyError, Settlement
from fetchproxy.testing import FakeProxy, Settled
from fetchproxy.v1 import fetch_pb2 as pb


@in_time
async def test_fetched_messages_are_settled_one_by_one() -> None:
    async with FakeProxy() as fake:
        records = [fake.publish(number, headers={"N": str(number)}) for number in range(3)]
        fetched = await fake.client.fetch("TASKS", "workers", 3)
        first, second, third = fetched.messages
        assert (first.data, first.payload, first.headers) == (b"0", b"0", {"N": ("0",)})
        assert fetched.empty_reason == ""
        assert await fake.client.ack(first.token) == "confirmed"
        assert await fake.client.ack(first.token) == "duplicate"
        assert await fake.client.nak(second.token, 1.5) == "confirmed"
        assert await fake.client.extend(third.token, 60) == pytest.approx(60, abs=1)
        assert await fake.client.term(third.token, "never") == "confirmed"
    assert records[0].settlements == [Settled("ack", attempt=1)]
    assert records[1].settlements == [Settled("nak", attempt=1, delay=1.5)]
    assert records[2].settlements == [Settled("term", attempt=1, reason="never")]


@in_time
async def test_settle_answers_for_each_part() -> None:
    async with FakeProxy() as fake:
        for number in range(3):
            fake.publish(number)
        fetched = await fake.client.fetch("TASKS", "workers", 3)
        tokens = [message.token for message in fetched.messages]
        fake.fail_settlement("LEASE_BUSY")
        results = await fake.client.settle(
            [
                Settlement.ack(tokens[0]),
                Settlement.nak(tokens[1]),
                Settlement.extend(tokens[2]),
                Settlement.term(tokens[2], "never"),
                Settlement.ack("unknown"),
            ]
        )
    assert results[:4] == ["confirmed", "confirmed", "extended", "confirmed"]
    error = results[4]
    assert isinstance(error, FetchProxyError)
    assert (error.reason, error.code) == ("TOKEN_INVALID", grpc.StatusCode.INVALID_ARGUMENT)


@in_time
async def test_part_that_stays_unconfirmed_is_an_error() -> None:
    async with FakeProxy() as fake:
        fake.publish(1)
        (message,) = (await fake.client.fetch("TASKS", "workers")).messages
        for _ in range(5):
            fake.fail_settlement("SETTLE_UNCONFIRMED")
        (error,) = await fake.client.settle([Settlement.ack(message.token)])
    assert isinstance(error, FetchProxyError)
    assert error.reason == "SETTLE_UNCONFIRMED"


@in_time
async def test_fetch_without_messages_says_why() -> None:
    async with FakeProxy() as fake:
        fetched = await fake.client.fetch("TASKS", "workers", max_wait=0)
    assert (fetched.messages, fetched.empty_reason) == ([], "NO_MESSAGES")


@in_time
async def test_call_is_repeated_if_its_reason_is_worth_it() -> None:
    async with FakeProxy() as fake:
        fake.publish(1)
        for _ in range(4):
            fake.fail("Fetch", "NATS_UNAVAILABLE")
        assert len((await fake.client.fetch("TASKS", "workers")).messages) == 1


@in_time
async def test_fetch_whose_answer_is_lost_brings_the_same_message() -> None:
    async with FakeProxy() as fake:
        record = fake.publish(1)
        fake.lose_answer("Fetch")
        (message,) = (await fake.client.fetch("TASKS", "workers")).messages
    assert (message.delivery_count, record.attempts) == (1, 1)
    first, second = fake.requests
    assert isinstance(first, pb.FetchRequest)
    assert isinstance(second, pb.FetchRequest)
    assert (first.attempt_again, second.attempt_again) == (False, True)
    assert first.attempt_id == second.attempt_id != ""


@in_time
async def test_call_is_made_five_times_at_most() -> None:
    async with FakeProxy() as fake:
        for _ in range(6):
            fake.fail("Ack", "DRAINING")
        with pytest.raises(FetchProxyError) as failure:
            await fake.client.ack("token")
        assert failure.value.reason == "DRAINING"
        with pytest.raises(FetchProxyError) as failure:
            await fake.client.ack("token")
        assert failure.value.reason == "TOKEN_INVALID"


@in_time
async def test_refusal_is_not_repeated() -> None:
    async with FakeProxy() as fake:
        fake.fail("Fetch", "STREAM_NOT_FOUND")
        with pytest.raises(FetchProxyError) as failure:
            await fake.client.fetch("TASKS", "workers", max_wait=0)
        assert failure.value.code == grpc.StatusCode.NOT_FOUND
        assert str(failure.value).startswith("STREAM_NOT_FOUND: ")
        assert not failure.value.is_repeatable
        assert not (await fake.client.fetch("TASKS", "workers", max_wait=0)).messages


@in_time
async def test_cancelled_fetch_is_given_back() -> None:
    async with FakeProxy() as fake:
        waiting = asyncio.ensure_future(fake.client.fetch("TASKS", "workers"))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    fetch, give_back = fake.requests
    assert isinstance(fetch, pb.FetchRequest)
    assert give_back == pb.GiveBackRequest(
        stream="TASKS", consumer="workers", attempt_id=fetch.attempt_id
    )


@in_time
async def test_call_without_a_proxy_fails_as_unavailable() -> None:
    async with FakeProxy() as fake:
        address = fake.address
    async with Client(address) as client:
        with pytest.raises(FetchProxyError) as failure:
            await client.ack("token")
    assert (failure.value.reason, failure.value.retry_delay) == ("UNAVAILABLE", None)


def test_credential_is_not_sent_to_another_machine_without_tls() -> None:
    with pytest.raises(ValueError, match="without TLS: use https://"):
        Client("proxy.example:50051", bearer_file="key")
    for address in ("localhost:50051", "dns:///127.0.0.1:50051", "[::1]:50051"):
        Client(address, bearer_file="key")
    Client("https://proxy.example:50051", bearer_file="key")


def test_wrong_address_or_half_a_certificate_is_refused() -> None:
    for address in ("", "http://proxy:50051", "https://"):
        with pytest.raises(ValueError, match="is not host:port"):
            Client(address)
    with pytest.raises(ValueError, match="belong together"):
        Client("https://proxy:50051", cert="cert.pem")


def test_client_reads_its_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETCH_PROXY_ADDR", "proxy.example:50051")
    monkeypatch.setenv("FETCH_PROXY_BEARER_FILE", "key")
    with pytest.raises(ValueError, match=r"is not sent to proxy\.example:50051"):
        Client.from_env()


@in_time
async def test_bearer_file_is_read_for_each_call(tmp_path: Path) -> None:
    file = tmp_path / "key"
    seen: list[str] = []

    async def ack(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        seen.extend(
            str(value)
            for name, value in context.invocation_metadata() or ()
            if name == "authorization"
        )
        return b"\x08\x01"

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Ack": grpc.unary_unary_rpc_method_handler(ack)
    }
    generic = grpc.method_handlers_generic_handler("fetchproxy.v1.FetchService", handlers)
    server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Client(f"127.0.0.1:{port}", bearer_file=str(file)) as client:
        for key in ("first", "second"):
            file.write_text(f"{key}\n")
            await client.ack("token")
    await server.stop(None)
    assert seen == ["Bearer first", "Bearer second"]
