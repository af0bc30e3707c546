"""Owns what a shim takes over from its static twin (zygote/shim.c), in whose place it was executed.

The twin leaves the number of a file in `GLOWPLUG_SHIM_STATE`: one JSON object with the fields of `Handed`, and the fds
that they name are open; SIGTERM, SIGINT and SIGCHLD are blocked. Times are seconds of CLOCK_MONOTONIC. Standard
library only.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields

from runtime.errors import FunctionError

VARIABLE = "GLOWPLUG_SHIM_STATE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A shim's state; fds are -1 where there is none. Without a worker, one that is asked for, or `parked`, there is

    a port and no more: a worker is to be started.
    """

    why: str  # the twin could not go on
    ask_pool: bool  # whether that would be of use
    greeted: bool  # the pool has said that it is ready
    start_id: str
    spans: list[tuple[str, str, int, int]]
    number: int  # of the last request for a worker
    turn: int
    worker: int  # its pid, or 0
    agent: str
    retired: bool  # it said that it goes on purpose
    finished: bool  # or that it has, with nothing left to do
    parked: bool
    stopping: bool
    forking: bool  # a worker is asked for
    known: dict[str, float]  # what the pool was told of the worker
    unread: bytes  # of its line
    listener: int
    pool: int
    line: int
    theirs: int  # the end of the line that is for the worker that is asked for
    pidfd: int
    arrived: int  # a connection that a worker has to serve
    asked_at: float
    heard: float
    kill_at: float = field(default=math.inf)
    leave_at: float = field(default=math.inf)


_FDS = ("listener", "pool", "line", "theirs", "pidfd", "arrived")


def handed() -> Handed | None:
    """What there is to take over, once. Raises `FunctionError` for what the twin of another version has left."""
    number = os.environ.pop(VARIABLE, "")
    if not number:
        return None
    with open(int(number), "rb") as file:
        file.seek(0)
        values = json.loads(file.read())
    known = {each.name for each in fields(Handed)}
    for name in _FDS:
        if (fd := values.get(name, -1)) >= 0:
            os.set_inheritable(fd, False)
    values["unread"] = values["unread"].encode("utf-8", "surrogateescape")
    values["spans"] = [tuple(row) for row in values["spans"]]
    try:
        return Handed(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise FunctionError(f"the static shim is of another version ({error}); build it anew") from error
