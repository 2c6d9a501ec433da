"""Failures of calls: what the proxy promises about each, and whether a repeat helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from fetchproxy.v1 import fetch_pb2 as pb

_Code = grpc.StatusCode

# Each reason of the proxy with its code: docs/reference/errors.md, which a test compares.
REASONS: Final[Mapping[str, grpc.StatusCode]] = {
    "INVALID_FIELD": _Code.INVALID_ARGUMENT,
    "TOKEN_INVALID": _Code.INVALID_ARGUMENT,
    "KEY_UNKNOWN": _Code.UNAVAILABLE,
    "STREAM_NOT_FOUND": _Code.NOT_FOUND,
    "CONSUMER_NOT_FOUND": _Code.NOT_FOUND,
    "CONSUMER_UNSUITABLE": _Code.FAILED_PRECONDITION,
    "CONSUMER_SUSPECTED": _Code.UNAVAILABLE,
    "CONSUMER_BUSY": _Code.RESOURCE_EXHAUSTED,
    "LEASE_EXPIRED": _Code.FAILED_PRECONDITION,
    "LEASE_SETTLED": _Code.FAILED_PRECONDITION,
    "LEASE_BUSY": _Code.ABORTED,
    "UNAUTHENTICATED": _Code.UNAUTHENTICATED,
    "AUTH_UNAVAILABLE": _Code.UNAVAILABLE,
    "NOT_ALLOWED": _Code.PERMISSION_DENIED,
    "NATS_PERMISSION": _Code.PERMISSION_DENIED,
    "RATE_LIMIT": _Code.RESOURCE_EXHAUSTED,
    "LEASE_LIMIT": _Code.RESOURCE_EXHAUSTED,
    "WAITER_LIMIT": _Code.RESOURCE_EXHAUSTED,
    "CALL_LIMIT": _Code.RESOURCE_EXHAUSTED,
    "BYTE_LIMIT": _Code.RESOURCE_EXHAUSTED,
    "REQUEST_TIMEOUT": _Code.UNAVAILABLE,
    "CONNECTION_LIMIT": _Code.RESOURCE_EXHAUSTED,
    "NATS_UNAVAILABLE": _Code.UNAVAILABLE,
    "DRAINING": _Code.UNAVAILABLE,
    "OWNER_UNREACHABLE": _Code.UNAVAILABLE,
    "SETTLE_UNCONFIRMED": _Code.DEADLINE_EXCEEDED,
    "STREAM_SILENT": _Code.DEADLINE_EXCEEDED,
    "JETSTREAM_DENIED": _Code.FAILED_PRECONDITION,
    "MALFORMED": _Code.INVALID_ARGUMENT,
    "REQUEST_TOO_LARGE": _Code.RESOURCE_EXHAUSTED,
    "UNSUPPORTED": _Code.UNIMPLEMENTED,
}

# With these codes a repeat does not help: a person must look.
_HOPELESS = {
    _Code.INVALID_ARGUMENT,
    _Code.NOT_FOUND,
    _Code.FAILED_PRECONDITION,
    _Code.PERMISSION_DENIED,
    _Code.UNAUTHENTICATED,
    _Code.UNIMPLEMENTED,
}


class FetchProxyError(Exception):
    """A call, or a part of a call, that failed."""

    def __init__(
        self,
        reason: str,
        code: grpc.StatusCode,
        message: str = "",
        retry_delay: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`retry_delay` is in seconds."""
        super().__init__(f"{reason}: {message}")
        #: A reason of the proxy, or the name of the status code.
        self.reason: Final = reason
        #: The status code.
        self.code: Final = code
        #: A text for people.
        self.message: Final = message
        #: How long the proxy asks to wait, in seconds. None: a wait does not help.
        self.retry_delay: Final = retry_delay
        #: The metadata of the reason.
        self.metadata: Final[Mapping[str, str]] = dict(metadata or {})

    @property
    def is_repeatable(self) -> bool:
        """Whether the same call may succeed later, without a person who acts."""
        return self.code not in _HOPELESS and self.reason != "REQUEST_TOO_LARGE"


def of_call(error: grpc.aio.AioRpcError) -> FetchProxyError:
    """The failure that a status tells."""
    code = error.code()
    reason, metadata, delay = code.name, {}, None
    for detail in _details(error):
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == "fetchproxy":
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            delay = seconds(retry.retry_delay)
    return FetchProxyError(reason, code, error.details() or "", delay, metadata)


def _details(error: grpc.aio.AioRpcError) -> list[status_pb2.Status]:
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []


def of_part(error: pb.SettleError | pb.FetchError) -> FetchProxyError:
    """The failure of a part of a call that is OK."""
    code = REASONS.get(error.reason, _Code.UNKNOWN)
    delay = seconds(error.retry_delay) if error.HasField("retry_delay") else None
    return FetchProxyError(error.reason, code, error.message, delay, error.metadata)


def part_is_repeatable(error: pb.SettleError) -> bool:
    """Whether this settlement may be repeated with the same token."""
    return error.HasField("retry_delay") or error.reason == "SETTLE_UNCONFIRMED"


def seconds(length: Duration) -> float:
    """A length of the contract in seconds."""
    return length.seconds + length.nanos / 1e9
