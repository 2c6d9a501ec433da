"""The connections to the proxy: their settings, and the files of credentials, which may change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc

from fetchproxy.contract import MAX_ANSWER, SERVICE, UNARY
from fetchproxy.v1 import fetch_pb2 as pb

# How long calls on a channel with old credentials may still take, in seconds.
_LAST_CALLS: Final = 20.0
_MEBIBYTE: Final = 1 << 20
_LOCAL: Final = ("localhost:", "127.0.0.1:", "[::1]:")

# docs/how-to/configure-the-channel.md has the reasons.
_OPTIONS: Final[dict[str, int | str]] = {
    "grpc.max_receive_message_length": MAX_ANSWER + _MEBIBYTE,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    # The window of a call. The library's own is 64 KiB.
    "grpc.http2.lookahead_bytes": _MEBIBYTE,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2_000,
    "grpc.service_config": json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}),
}

Files: TypeAlias = tuple[bytes | None, bytes | None, bytes | None]


class Channel:
    """The channel to a proxy. It is made by the first call, and again for new certificates."""

    def __init__(
        self,
        address: str,
        ca: str | None,
        cert: str | None,
        key: str | None,
        bearer_file: str | None,
    ) -> None:
        """Opens nothing. A wrong combination is a ValueError."""
        self._target = address.removeprefix("https://")
        self._tls = self._target != address
        self._paths = (ca, key, cert)
        self._bearer_file = bearer_file
        self._files: Files | None = None
        self._channel: grpc.aio.Channel | None = None
        self._calls: dict[str, Any] = {}
        self._closing: set[asyncio.Task[None]] = set()
        if not self._target or "://" in self._target.removeprefix("dns:///"):
            raise ValueError(f"{address!r} is not host:port, https://host:port or dns:///name:port")
        if (cert is None) != (key is None):
            raise ValueError("a certificate and its key belong together: set both or none")
        local = self._target.removeprefix("dns:///").startswith(_LOCAL)
        if bearer_file and not (self._tls or local):
            raise ValueError(
                f"a credential is not sent to {address} without TLS: use https://host:port"
            )

    def call(self, method: str, request: Any, deadline: float) -> Awaitable[Any]:
        """Makes a call. `deadline` is in seconds from now."""
        call = self._method(method)
        result: Awaitable[Any] = call(request, timeout=deadline, metadata=self._metadata())
        return result

    def consume(self) -> grpc.aio.StreamStreamCall[pb.ConsumeRequest, pb.ConsumeResponse]:
        """Opens a stream."""
        call = self._method("Consume")
        stream: grpc.aio.StreamStreamCall[pb.ConsumeRequest, pb.ConsumeResponse]
        stream = call(metadata=self._metadata())
        return stream

    async def close(self) -> None:
        """Ends all connections, calls included."""
        channels = [self._channel.close(0)] if self._channel else []
        self._channel, self._files = None, None
        await asyncio.gather(*channels, *self._closing)

    def _method(self, name: str) -> Any:
        files = self._read()
        if self._channel is None or files != self._files:
            self._replace(files)
        return self._calls[name]

    def _read(self) -> Files:
        ca, key, cert = (Path(path).read_bytes() if path else None for path in self._paths)
        return ca, key, cert

    def _replace(self, files: Files) -> None:
        if old := self._channel:
            task = asyncio.ensure_future(old.close(_LAST_CALLS))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        options = list(_OPTIONS.items())
        if self._tls:
            credentials = grpc.ssl_channel_credentials(*files)
            channel = grpc.aio.secure_channel(self._target, credentials, options)
        else:
            channel = grpc.aio.insecure_channel(self._target, options)
        self._channel, self._files = channel, files
        self._calls = {
            name: channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            for name, (request, response) in UNARY.items()
        }
        self._calls["Consume"] = channel.stream_stream(
            f"/{SERVICE}/Consume",
            request_serializer=pb.ConsumeRequest.SerializeToString,
            response_deserializer=pb.ConsumeResponse.FromString,
        )

    def _metadata(self) -> list[tuple[str, str]]:
        if not self._bearer_file:
            return []
        token = Path(self._bearer_file).read_text(encoding="utf-8").strip()
        return [("authorization", f"Bearer {token}")]
