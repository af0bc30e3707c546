"""Owns a pool's zygote: a fork server whose children enter the container that they were asked for.

    python -m runtime.zygote.placed FD SPEC

A request to fork has, besides what forkserver.py says, a `place` (see join.py) and five fds more at the end: the
worker's standard input, output and error, a pidfd of the container's first process, and its root directory.
"""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
from pathlib import Path
from typing import Any

from runtime.zygote import forkserver, join
from runtime.zygote.node import NOT_PLACED
from runtime.zygote.spawn import Spec
from runtime.zygote.warm import Warm
from runtime.zygote.wire import Wire


class Entering:
    """How this zygote forks, and what its children do first."""

    def __init__(self, seccomp: bytes = b"") -> None:
        self._home = os.pidfd_open(os.getpid())
        self._prefixes = runtime_directories()
        self._seccomp = seccomp

    def fork(self, request: dict[str, Any], fds: list[int]) -> int:
        return join.fork_into(fds[-2], self._home) if "place" in request else os.fork()

    def enter(self, request: dict[str, Any], fds: list[int]) -> None:
        """Leaves in `fds` what is for the worker."""
        if "place" not in request:
            return
        forkserver.keep_only({0, 1, 2, *fds})
        *_, stdin, stdout, stderr, pidfd, root = fds
        streams = stdin, stdout, stderr
        try:
            join.enter(
                request["place"], pidfd=pidfd, root=root, stdio=streams, prefixes=self._prefixes, seccomp=self._seccomp
            )
        except OSError as error:
            # Half inside, it must not go on, and nobody's code has run yet.
            os.write(2, f"glowplug: the pool's worker could not enter the container: {error}\n".encode())
            os._exit(NOT_PLACED)
        del fds[-5:]


def runtime_directories() -> tuple[str, ...]:
    """Where modules are imported from: what a container must have at the same path, none inside another."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {str(Path(__file__).resolve().parents[1]), str(Path(join.__file__).resolve().parents[2] / "cache_agent")}
    real = sorted(os.path.realpath(path) for path in paths if os.path.isdir(path))
    return tuple(path for path in real if not any(path.startswith(f"{other}/") for other in real))


def main(arguments: list[str]) -> int:
    os.set_inheritable(int(arguments[0]), False)
    spec = Spec.parse(arguments[1])
    wire = Wire(socket.socket(fileno=int(arguments[0])))
    filter_file = os.environ.pop("GLOWPLUG_POOL_SECCOMP", "")
    entering = Entering(Path(filter_file).read_bytes() if filter_file else b"")
    return forkserver.build(wire, spec, lambda: Warm.lang(spec.kinds, lean=spec.lean), entering.fork, entering.enter)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
