"""The state that the shim takes over from its static twin (shim.c), in whose place it was executed.

The twin leaves the number of a file in `GLOWPLUG_SHIM_STATE`: a message (see process/messages.py) with the fields of
`ShimState`, then, after an empty field, those bytes of the line that no message was made of yet. The fds that the
fields name are open; SIGTERM, SIGINT and SIGCHLD are blocked. Times are seconds of CLOCK_MONOTONIC. Standard library
only.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields

from runtime.errors import FunctionError
from runtime.process import messages

VARIABLE = "GLOWPLUG_SHIM_STATE"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShimState:
    """The twin's state; fds are -1 where there is none.

    A worker is there, or is asked for (`forking`), or none is wanted (`parked`, on standby); else one is to be started.
    """

    why: str  # the reason for which the twin could not go on
    ask_pool: bool  # whether asking the pool may be of use
    greeted: bool  # whether the pool has said that it is ready
    start_id: str
    spans: list[messages.Span]
    number: int  # of the last request for a worker
    turn: int
    worker: int  # the worker's pid, or 0
    agent: str
    retired: bool  # whether the worker said that it goes on purpose
    finished: bool  # whether the worker said that it has nothing left to do
    parked: bool
    stopping: bool
    forking: bool
    known: dict[str, float]  # what the pool was told of the worker
    unread: bytes  # of the worker's line
    listener: int
    pool: int
    line: int
    theirs: int  # the worker's end of the line, while a worker is asked for
    pidfd: int
    arrived: int  # a connection that a worker has to serve
    asked_at: float
    heard: float
    kill_at: float = field(default=math.inf)
    leave_at: float = field(default=math.inf)


_FDS = ("listener", "pool", "line", "theirs", "pidfd", "arrived")
_KNOWN = ("serves", "load", "bytes")
_KINDS: dict[str, messages.Kind] = {
    "int": messages.whole,
    "bool": lambda text: bool(messages.whole(text)),
    "float": float,
}


def handed() -> ShimState | None:
    """Return what the twin has left, once; None without a twin. Raises `FunctionError` for one of another version."""
    number = os.environ.pop(VARIABLE, "")
    if not number:
        return None
    with open(int(number), "rb") as file:
        file.seek(0)
        state, _, unread = file.read().partition(b"\0\0")
    kinds = {each.name: _KINDS[str(each.type)] for each in fields(ShimState) if str(each.type) in _KINDS}
    try:
        values = messages.unpack(state + b"\0", {**messages.KINDS, **kinds})
        known = {name: values.pop(name) for name in _KNOWN if name in values}
        found = ShimState(**values, known=known, unread=unread)
    except (TypeError, ValueError) as error:
        raise FunctionError(f"the static shim is of another version ({error}); build it anew") from error
    for name in _FDS:
        if (fd := getattr(found, name)) >= 0:
            os.set_inheritable(fd, False)
    return found
