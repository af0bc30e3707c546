"""A client's position in an answer, as the ids of server-sent events state it. Pure.

    id: chatcmpl-6f…:12.7f        sent: 12 tokens of choice 0; 7 tokens of choice 1, and its end
    id: chatcmpl-6f…:30f.7f.u     sent: 30 and 7 tokens, both ends, and the usage

A client that reconnects sends the last id that it saw as `Last-Event-ID`, and gets the events after that one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{15,120}):(\d{1,7}f?(?:\.\d{1,7}f?){0,1023})(\.u)?")


@dataclass(frozen=True, slots=True)
class Position:
    """The parts of the answer to request `id` that a client has: tokens and end of each choice, and the usage."""

    id: str
    sent: tuple[int, ...]
    ended: tuple[bool, ...]
    usage: bool = False

    def __str__(self) -> str:
        return written(self.id, self.sent, self.ended, self.usage)


def written(request: str, sent: Sequence[int], ended: Sequence[bool], usage: bool) -> str:
    """Return the id of the event with which a client has this much of an answer."""
    choices = ".".join(f"{count}f" if end else f"{count}" for count, end in zip(sent, ended, strict=True))
    return f"{request}:{choices}{'.u' if usage else ''}"


def parse(text: str) -> Position | None:
    """Return the position that an event's id states; None for a text of another form."""
    if (found := _ID.fullmatch(text.strip())) is None:
        return None
    choices = found[2].split(".")
    counts = tuple(int(choice.removesuffix("f")) for choice in choices)
    return Position(found[1], counts, tuple(choice.endswith("f") for choice in choices), bool(found[3]))
