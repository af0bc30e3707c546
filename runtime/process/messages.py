"""The bytes of a message between a shim, its worker, zygotes and a pool: `name=value` texts, each ended by a NUL.

    name=value␀                      a field: a text, or what `KINDS` makes of a value with this name
    span=START END OWNER NAME␀       one of the ledger's `spans`, ns of CLOCK_MONOTONIC: the only field that repeats
    ␀ NAME=value␀ NAME=value␀ …      after all fields, and an empty one: a process's environment, as `environment`

An environment in /proc looks the same. C needs no parser for such messages: container/text.h reads and writes them for
the static shim. Of fields, or of variables, with the same name the first one counts, as for getenv. Bytes that are no
UTF-8 survive. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

VERSION = 2  # of the messages between a shim and a pool; version 1 was JSON
Span: TypeAlias = tuple[str, str, int, int]  # owner, name, start, end
Kind: TypeAlias = Callable[[str], object]

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_SPAN = re.compile(r"(-?[0-9]{1,18}) (-?[0-9]{1,18}) ([^ ]+) (.+)", re.DOTALL)


def whole(text: str) -> int:
    """Return a whole number of at most 18 digits. Raises `ValueError`."""
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no whole number")
    return int(text)


KINDS: Mapping[str, Kind] = dict.fromkeys(
    (
        "asked", "beat", "bytes", "ended", "fork", "forked", "keep", "kept", "load", "parked", "pid", "refused",
        "retire", "size", "status", "turn", "wants",
    ),
    whole,
) | {"seconds": float, "serves": float}  # fmt: skip


def pack(message: Mapping[str, Any]) -> bytes:
    """Return the bytes of a message; a NUL in a text becomes a space, half a surrogate pair a question mark."""
    fields: list[str] = []
    for name, value in message.items():
        if name == "spans":
            fields += [f"span={start} {end} {owner} {what}" for owner, what, start, end in value]
        elif name != "environment":
            fields.append(f"{name}={value}")
    texts = [field.replace("\0", " ") for field in fields]
    if "environment" in message:
        texts += ["", *(f"{name}={value}" for name, value in message["environment"].items())]
    return b"".join(_encoded(text) + b"\0" for text in texts)


def unpack(data: bytes, kinds: Mapping[str, Kind] = KINDS) -> dict[str, Any]:
    """Return the message of these bytes. Raises `ValueError`."""
    if not data.endswith(b"\0"):
        raise ValueError("a message ends with a NUL")
    fields, more, variables = data.decode("utf-8", "surrogateescape").partition("\0\0")
    message: dict[str, Any] = {}
    for field in fields.removesuffix("\0").split("\0"):
        name, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"{field[:40]!r} is no field")
        if name == "span":
            message.setdefault("spans", []).append(_span(value))
        elif name not in message:
            message[name] = kinds.get(name, str)(value)
    if more:
        message["environment"] = _environment(variables.split("\0"))
    return message


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def _span(text: str) -> Span:
    found = _SPAN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is no span")
    return found[3], found[4], int(found[1]), int(found[2])


def _environment(variables: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if name and equals:
            found.setdefault(name, value)
    return found
