"""A supervisor's side of its zygotes: starting them, asking them to fork, noticing that they are silent or gone.

    zygote = boot(Spec(...))                      # a process of its own, that begins with the interpreter
    deeper = zygote.fork_zygote(spec, lease)      # one that begins with all that the first one has
    zygote.fork_worker(number, ...)
    for event in zygote.read(): ...               # never blocks

Nothing here waits: a supervisor polls `zygote.wire` and `zygote.pidfd`, and calls `overdue` now and then. It has to be
a subreaper, because the children of a zygote that died become its own. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from runtime.process import wire
from runtime.process.messages import Span
from runtime.process.wire import Gone, Wire

NO_ENTRY = "it could not enter the container"  # a pool's reason that begins like this is final
PROGRAM = ("-m", "runtime.zygote.forkserver")
SILENCE = 1.0  # seconds without a beat after which a zygote that was ready counts as hanging
BUILD = 120.0  # seconds that building may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The build of a zygote. `key` names it (see keys.py); `kinds` are the model types whose code it imports."""

    key: str = ""
    kinds: tuple[str, ...] = ()
    lean: bool = True

    @classmethod
    def parse(cls, text: str) -> Spec:
        values = json.loads(text)
        return cls(**{**values, "kinds": tuple(values.get("kinds", ()))})

    def dump(self) -> str:
        return json.dumps(asdict(self))


class ZygoteReady(NamedTuple):
    """A zygote that may be forked: the seconds that building took, the bytes that would be free if it went."""

    level: str
    key: str
    seconds: float
    bytes: int


class Forked(NamedTuple):
    """A process that was forked; `number` is the request's, and the pidfd is the caller's to close."""

    number: int
    pid: int
    pidfd: int


class ForkRefused(NamedTuple):
    """A request to fork that was refused, and the reason."""

    number: int
    why: str


class Ended(NamedTuple):
    """The end of a child, with its status as waitpid gives it."""

    pid: int
    status: int


class Lost(NamedTuple):
    """The loss of a zygote; its children live on, and are the supervisor's to reap."""

    why: str


ChildEvent = Forked | ForkRefused | Ended
ZygoteEvent = ZygoteReady | ChildEvent | Lost


@dataclass(frozen=True, slots=True)
class LeaseFds:
    """The fds of a lease, on which a model layer is built; the lease's holder closes them."""

    size: int  # of the manifest, in bytes
    manifest: int
    segments: Sequence[int]


class Zygote:
    """One zygote as its supervisor sees it. `state` goes from building to ready to gone."""

    def __init__(self, wire: Wire, pid: int, pidfd: int) -> None:
        self.wire, self.pid, self.pidfd = wire, pid, pidfd
        self.state = "building"
        self.lost = ""  # the reason for which it is gone
        self._since: float | None = None  # when `overdue` was called first, on the caller's clock
        self._heard = 0.0  # when `overdue` found that the zygote had spoken, on the same clock
        self._spoke = True  # whether the zygote has spoken since the last call of `overdue`
        self._paused = False

    def read(self) -> list[ZygoteEvent]:
        """Return what the zygote has said since the last call."""
        events: list[ZygoteEvent] = []
        while self.state != "gone":
            try:
                self.wire.flush()
                received = self.wire.receive()
            except Gone as gone:
                events.append(self._lose(f"it went away ({gone})"))
                break
            if received is None:
                break
            self._spoke = True
            event = self._event(*received)
            if event is not None:
                events.append(event)
        return events

    def _event(self, message: dict[str, Any], fds: list[int]) -> ZygoteEvent | None:
        match message, fds:
            case {"ready": str(level), "key": str(key), "seconds": float(seconds), "bytes": int(size)}, []:
                self.state = "ready"
                return ZygoteReady(level, key, seconds, size)
            case {"failed": str(text)}, []:
                return self._lose(text)
            case {"forked": int(number), "pid": int(pid)}, [pidfd]:
                return Forked(number, pid, pidfd)
            case {"refused": int(number), "why": str(why)}, []:
                return ForkRefused(number, why)
            case {"ended": int(pid), "status": int(status)}, []:
                return Ended(pid, status)
        for fd in fds:
            os.close(fd)
        return None

    def overdue(self, now: float) -> str:
        """Return why the zygote counts as hanging at `now`, or "".

        `now` is in seconds of any clock that does not go back. No other clock is read: silence begins with the first
        call after a message of the zygote, building with the first call of all.
        """
        if self._since is None:
            self._since = now
        if self._spoke:
            self._heard, self._spoke = now, False
        if self._paused or self.state == "gone":
            return ""
        if self.state == "building":
            return f"it was not ready after {BUILD:.0f} s" if now - self._since > BUILD else ""
        return f"it was silent for {SILENCE:.0f} s" if now - self._heard > SILENCE else ""

    def fork_worker(
        self,
        number: int,
        *,
        listener: int,
        line: int,
        connections: Sequence[int] = (),
        environment: Mapping[str, str],
        start_id: str,
        spans: Sequence[Span],
        why: str = "",
        cwd: str = "/",
        **more: Any,
    ) -> None:
        """Ask for a worker; `Forked` or `ForkRefused` follows. Raises `Gone`.

        `why` says for what reason the worker is not forked from a deeper layer; `more` is for the zygote's own `fork`
        and `enter`.
        """
        request = {"fork": number, "kind": "worker", "environment": dict(environment), "cwd": cwd}
        request |= {"start_id": start_id, "spans": spans, "why": why, **more}
        self.wire.send(request, [listener, line, *connections])

    def fork_zygote(self, number: int, spec: Spec, lease: LeaseFds) -> Wire:
        """Ask for the layer of a model on top of this one; `Forked` or `ForkRefused` follows. Raises `Gone`.

        Return the wire for `Zygote(wire, forked.pid, forked.pidfd)`.
        """
        ours, theirs = wire.pair()
        with theirs:
            request = {"fork": number, "kind": "zygote", "spec": spec.dump(), "size": lease.size}
            request |= {"environment": dict(os.environ)}
            self.wire.send(request, [theirs.fileno(), lease.manifest, *lease.segments])
        return Wire(ours)

    def pause(self, paused: bool = True) -> None:
        """Stop the zygote, or let it go on: building must not take time from requests."""
        if paused != self._paused and self.state != "gone":
            self._paused = paused
            self._spoke = True  # a stopped zygote cannot speak, and is not silent for that
            self.signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self, why: str = "") -> None:
        """Kill the zygote, not its children. `why` is the answer to a request to fork that is under way."""
        self.signal(signal.SIGKILL)
        self._lose(why or "it was killed")

    def _lose(self, why: str) -> Lost:
        if self.state != "gone":
            self.state, self.lost = "gone", why
            self.wire.close()
        return Lost(why)

    def close(self) -> None:
        self._lose("closed")
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def boot(
    spec: Spec,
    *,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> Zygote:
    """Start a zygote that builds its layer from the interpreter up, as a child of this process."""
    ours, theirs = wire.pair()
    with theirs:
        fd = theirs.fileno()
        os.set_inheritable(fd, True)
        variables = dict(os.environ if environment is None else environment)
        # Set before anything is imported: a child of a process that ever computed on two threads hangs.
        variables |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", *program, str(fd), spec.dump()]
        pid = os.posix_spawn(sys.executable, command, variables)
    return Zygote(Wire(ours), pid, os.pidfd_open(pid))
