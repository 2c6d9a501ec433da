"""How a payload becomes the data of a message. A decoder that raises terminates the message."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

from fetchproxy.v1 import fetch_pb2 as pb

T = TypeVar("T")

#: A name, a function of the payload, a dataclass, or a model of pydantic.
Decode: TypeAlias = Literal["json", "text", "bytes"] | Callable[[bytes], T] | type[T]


def decoder(decode: Any) -> tuple[Callable[[bytes], Any], pb.Codec]:
    """The function that decodes, and the codec that the proxy checks before. A wrong `decode` is a
    TypeError."""
    if decode == "json":
        return _unless_empty(json.loads), pb.CODEC_JSON
    if decode == "text":
        return bytes.decode, pb.CODEC_TEXT
    if decode == "bytes":
        return bytes, pb.CODEC_RAW
    if isinstance(decode, type):
        if hasattr(decode, "model_validate_json"):
            return _unless_empty(decode.model_validate_json), pb.CODEC_JSON
        if dataclasses.is_dataclass(decode):
            return _unless_empty(_into(decode)), pb.CODEC_JSON
    if callable(decode):
        return decode, pb.CODEC_RAW
    raise TypeError(f"decode is {decode!r}: neither 'json', 'text', 'bytes' nor a function")


def _unless_empty(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The proxy has judged the payload: an empty payload was never one of JSON."""
    return lambda payload: parse(payload) if payload else None


def _into(schema: Any) -> Callable[[bytes], Any]:
    """The fields of a JSON object become those of a dataclass. A class within it stays a dict."""
    names = {field.name for field in dataclasses.fields(schema) if field.init}

    def parse(payload: bytes) -> Any:
        value = json.loads(payload)
        if not isinstance(value, dict):
            raise TypeError(f"{type(value).__name__} is not an object")
        return schema(**{name: value[name] for name in names & value.keys()})

    return parse
