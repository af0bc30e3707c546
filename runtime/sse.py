"""Owns the encoding of event streams (text/event-stream, WHATWG HTML §9.2), both ways. Pure.

An event is lines `id: …`, `event: …`, `data: …` and an empty line; a line that begins with a colon is a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DONE = b"data: [DONE]\n\n"  # the last event of an OpenAI stream
KEEP_ALIVE = b": keep-alive\n\n"

_LINE_END = re.compile(r"\r\n|\r|\n")
_MAX_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event as received: `id` is the last id in the stream so far, `event` the event's type."""

    data: str
    id: str | None = None
    event: str = "message"


def event(data: str | bytes, id: str | None = None, event: str | None = None) -> bytes:  # noqa: A002  the field's name
    """Encode one event. Line ends in `data` become "\\n" at the receiver; in `id` and `event` they raise ValueError."""
    if isinstance(data, bytes):
        if id is None and event is None and b"\n" not in data and b"\r" not in data:
            return b"data: %b\n\n" % data  # the quick way for a stream of JSON objects, one per token
        data = data.decode()
    lines = []
    for name, value in (("id", id), ("event", event)):
        if value is not None:
            if _LINE_END.search(value) or "\0" in value:
                raise ValueError(f"the {name} of an event must be one line without NUL, not {value!r}")
            lines.append(f"{name}: {value}\n")
    lines += [f"data: {line}\n" for line in _LINE_END.split(data)]
    return "".join([*lines, "\n"]).encode()


class EventParser:
    """A parser of event streams: bytes in, events out, however the bytes are cut into pieces."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self._buffer = bytearray()
        self._after_cr = False
        self._started = False
        self._data: list[str] = []
        self._event = ""

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """Return the events that `chunk` completes. Raise ValueError for a line of more than 1 MiB."""
        events = []
        # A line ends with CR, LF or both: after a CR the line is complete, and a following LF is skipped.
        for piece in re.split(rb"(\r|\n)", chunk):
            if piece == b"\n" and self._after_cr:
                self._after_cr = False
            elif piece in (b"\r", b"\n"):
                self._after_cr = piece == b"\r"
                if (found := self._line(self._buffer.decode(errors="replace"))) is not None:
                    events.append(found)
                self._buffer.clear()
            elif piece:
                self._after_cr = False
                self._buffer += piece
                if len(self._buffer) > _MAX_LINE:
                    raise ValueError(f"a line of the event stream is longer than {_MAX_LINE} bytes")
        return events

    def _line(self, line: str) -> ServerEvent | None:
        if not self._started:
            self._started = True
            line = line.removeprefix("\ufeff")
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self.last_id = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, kind = self._data, self._event or "message"
        self._data, self._event = [], ""
        return ServerEvent("\n".join(data), self.last_id, kind) if data else None
