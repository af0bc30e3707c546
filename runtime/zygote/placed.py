"""The zygotes of a pool: forkserver.py's, with workers that enter the container that they are for.

    python -m runtime.zygote.placed FD SPEC

A request to fork has a `place` (see join.py), and as fds a wire, a pidfd of the container's first process, and the
container's root directory. The child enters the container at once. It is a spare until an order comes over its wire:
the request for a worker as forkserver.py describes it, with standard input, output and error as the last fds. A spare
whose wire is closed ends.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NoReturn

from runtime.layers.spawn import NO_ENTRY, Spec
from runtime.process.children import private_bytes
from runtime.process.wire import Gone, Wire
from runtime.zygote import forkserver, join
from runtime.zygote.warm import Warm

_AT_ONCE = 200  # ms within which the order comes if a request waits; a spare rehearses only after that
_STDIO = 3  # fds: standard input, output and error
_NOT_PLACED = 74  # exit code of a child that could not enter its container


class ContainerEntry:
    """The functions `fork` and `enter` of a `ForkServer` whose children enter containers."""

    def __init__(self, seccomp: bytes = b"") -> None:
        self._prefixes = runtime_directories()
        self._seccomp = seccomp

    def fork(self, request: dict[str, Any], fds: list[int]) -> int:
        """Fork into the place of the request, if there is one; return as `os.fork` does."""
        if "place" not in request:
            return os.fork()
        request["place"] = json.loads(request["place"])
        home = os.pidfd_open(os.getpid())
        try:
            return join.fork_into(request["place"], fds[1], home)
        finally:
            os.close(home)

    def enter(self, request: dict[str, Any], fds: list[int], warm: Warm) -> None:
        """Enter the container, wait for the order, and leave the worker's request and fds in `request` and `fds`."""
        if "place" not in request:
            return
        born = time.monotonic_ns()
        wire, pidfd, root = fds
        forkserver.name_process("spare")
        forkserver.keep_only(set(fds))
        for _ in range(_STDIO):  # the pool's own input and output are closed to a container
            os.open(os.devnull, os.O_RDWR)
        try:
            charged = join.enter(
                request["place"], pidfd=pidfd, root=root, prefixes=self._prefixes, seccomp=self._seccomp
            )
        except OSError as error:
            _leave(Wire(socket.socket(fileno=wire)), f"{NO_ENTRY}: {error}")
        os.close(pidfd)
        os.close(root)
        joined = time.monotonic_ns()
        steps = [("fork", request["asked"], born), ("cgroup", born, charged), ("join", charged, joined)]
        order, fds[:] = _ordered(Wire(socket.socket(fileno=wire)), warm, (joined - request["asked"]) / 1e9)
        for target, fd in enumerate(fds[-_STDIO:]):
            os.dup2(fd, target)
        del fds[-_STDIO:]
        spans = order.get("spans", [])
        since = min((start for _, _, start, _ in spans), default=0)  # earlier steps are no part of this start
        spans += [("pool", name, start, end) for name, start, end in steps if start >= since]
        request.update(order, spans=spans)


def _leave(wire: Wire, why: str) -> NoReturn:
    """Tell the pool why the container could not be entered, and end: half inside, the process must not go on."""
    try:
        wire.send({"failed": why})
    finally:
        os._exit(_NOT_PLACED)


def _ordered(wire: Wire, warm: Warm, seconds: float) -> tuple[dict[str, Any], list[int]]:
    """Wait for the order; return it and its fds. Forking and entering took `seconds`.

    A spare that no request waits for rehearses, and takes so much time off the later start. The wait has no deadline:
    the pool drops a spare that is not worth its memory, and a spare ends with its container.
    """
    poller = select.poll()
    poller.register(wire, select.POLLIN)
    try:
        if not poller.poll(_AT_ONCE):
            begun = time.monotonic()
            for _ in warm.rehearse():
                if poller.poll(0):
                    break
            wire.send({"parked": private_bytes(), "seconds": seconds + time.monotonic() - begun})
        while (received := wire.receive()) is None:
            poller.poll()
    except Gone:
        os._exit(0)
    wire.close()
    return received


def runtime_directories() -> tuple[str, ...]:
    """Return the directories that modules are imported from, none inside another.

    A container must have them at the same paths.
    """
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {str(Path(__file__).resolve().parents[1]), str(Path(join.__file__).resolve().parents[2] / "cache_agent")}
    real = sorted(os.path.realpath(path) for path in paths if os.path.isdir(path))
    return tuple(path for path in real if not any(path.startswith(f"{other}/") for other in real))


def main(arguments: list[str]) -> int:
    os.set_inheritable(int(arguments[0]), False)
    spec = Spec.parse(arguments[1])
    wire = Wire(socket.socket(fileno=int(arguments[0])))
    filter_file = os.environ.pop("GLOWPLUG_POOL_SECCOMP", "")
    entry = ContainerEntry(Path(filter_file).read_bytes() if filter_file else b"")

    def make() -> Warm:
        return Warm.lang(spec.kinds, lean=spec.lean, shared=True)

    return forkserver.build(wire, spec, make, entry.fork, entry.enter)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
