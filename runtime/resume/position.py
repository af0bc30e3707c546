"""Owns how far a client has come in an answer, as it stands in the ids of server-sent events. Pure.

    id: chatcmpl-6f…:12.7f        12 tokens of choice 0 are told, all 7 of choice 1 and that it has ended
    id: chatcmpl-6f…:30f.7f.u     … and the usage

A client that reconnects sends the last id it saw as `Last-Event-ID`, and gets what follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{15,120}):(\d{1,7}f?(?:\.\d{1,7}f?){0,1023})(\.u)?")


@dataclass(frozen=True, slots=True)
class Position:
    """Of the answer to request `id`: tokens told of each choice, and whether its end was told; and the usage."""

    id: str
    told: tuple[int, ...]
    ended: tuple[bool, ...]
    usage: bool = False

    def __str__(self) -> str:
        return written(self.id, self.told, self.ended, self.usage)


def written(request: str, told: Sequence[int], ended: Sequence[bool], usage: bool) -> str:
    """The id of an event after which so much was told."""
    choices = ".".join(f"{count}f" if end else f"{count}" for count, end in zip(told, ended, strict=True))
    return f"{request}:{choices}{'.u' if usage else ''}"


def parse(text: str) -> Position | None:
    """None for what is no id of ours."""
    if (found := _ID.fullmatch(text.strip())) is None:
        return None
    choices = found[2].split(".")
    counts = tuple(int(choice.removesuffix("f")) for choice in choices)
    return Position(found[1], counts, tuple(choice.endswith("f") for choice in choices), bool(found[3]))
