"""Owns a zygote: a warm process with one thread that forks workers and deeper zygotes, and tells how they ended.

    python -m runtime.zygote.forkserver FD SPEC        FD: its end of a wire (see wire.py), SPEC: a `Spec` as JSON

A zygote forks only while that is safe: one thread, no socket but its own, CUDA untouched, nothing for the garbage
collector to write to. Fds of a request to fork

    a worker    the listening socket, the control line, then connections that were accepted already
    a zygote    its end of a new wire, then the model's manifest and segments

stay open in the child, besides standard input, output and error; all others are closed. The child begins with every
signal that ends it blocked, as a worker that is executed does. Children outlive their zygote, as orphans.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeAlias

from runtime.layers.spawn import Spec
from runtime.process import kernel
from runtime.process.children import private_bytes, reap
from runtime.process.wakeup import Wakeup
from runtime.process.wire import Gone, Wire
from runtime.zygote.warm import Warm

BEAT = 0.25  # seconds between two beats
Fork: TypeAlias = Callable[[dict[str, Any], list[int]], int]
Enter: TypeAlias = Callable[[dict[str, Any], list[int], Warm], None]
_PR_SET_NAME = 15
_BLOCKED = (signal.SIGTERM, signal.SIGINT)


class ForkServer:
    """The loop of a zygote.

    `fork` forks, and `enter` is called first of all in the child: the zygotes of a pool have functions of their own for
    that (placed.py). Both get the request and its fds, `enter` also the warm layer.
    """

    def __init__(
        self,
        wire: Wire,
        warm: Warm,
        key: str,
        *,
        fork: Fork | None = None,
        enter: Enter | None = None,
    ) -> None:
        self._wire, self._warm, self._key = wire, warm, key
        self._fork, self._enter = fork, enter
        self._known_sockets = {wire.fileno()}  # fds that are no reason not to fork: a child closes them, or needs them

    def run(self, since: int) -> None:
        """Serve the wire until its other end is closed. Returns in the zygote only, never in a child.

        `since` is when building began, in ns of CLOCK_MONOTONIC.
        """
        seal()
        wake = Wakeup(signal.SIGCHLD)
        self._known_sockets |= {*wake.fds}
        try:
            if why := self.unfit():
                raise Unfit(why)
        except Unfit as error:
            with contextlib.suppress(Gone):
                self._wire.send({"failed": str(error)})
            return
        with contextlib.suppress(Gone):
            self._wire.send(
                {
                    "ready": self._warm.level,
                    "key": self._key,
                    "seconds": (time.monotonic_ns() - since) / 1e9,
                    "bytes": private_bytes(),
                }
            )
            poller = select.poll()
            poller.register(wake, select.POLLIN)
            beat_at = 0.0
            while True:
                poller.register(self._wire, select.POLLIN | (select.POLLOUT if self._wire.waiting else 0))
                poller.poll(BEAT * 1000)
                wake.take()
                self._reap()
                while (received := self._wire.receive()) is not None:
                    self._take(*received)
                self._wire.flush()
                if time.monotonic() >= beat_at and not self._wire.waiting:
                    self._wire.send({"beat": 1})
                    beat_at = time.monotonic() + BEAT

    def unfit(self) -> str:
        """Return why this process must not be forked, or ""."""
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            return f"it has {threads} threads, and a child would have one and the locks of all"
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:") and int(name) > 2 and int(name) not in self._known_sockets:
                    return f"it has a socket (fd {name}) that its children would share"
                if target.startswith("/dev/nvidia"):
                    return f"it has opened {target}; CUDA does not survive a fork"
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if cuda is not None and cuda.is_initialized():
            return "CUDA was initialised, which does not survive a fork"
        return ""

    def _reap(self) -> None:
        for pid, status in reap().items():
            self._wire.send({"ended": pid, "status": status})

    def _take(self, request: dict[str, Any], fds: list[int]) -> None:
        if "fork" not in request:
            _close(fds)
            return
        number = request["fork"]
        self._known_sockets |= set(fds)
        try:
            if why := self.unfit():
                self._wire.send({"refused": number, "why": why})
                return
            try:
                pid = self._fork(request, fds) if self._fork is not None else os.fork()
            except OSError as error:
                self._wire.send({"refused": number, "why": f"it could not be forked: {error.strerror}"})
                return
            if pid == 0:
                _live(lambda: self._be(request, fds))
            pidfd = os.pidfd_open(pid)
            try:
                self._wire.send({"forked": number, "pid": pid}, [pidfd])
            finally:
                os.close(pidfd)
        finally:
            self._known_sockets -= set(fds)
            _close(fds)

    def _be(self, request: dict[str, Any], fds: list[int]) -> int:
        """Live as the child that was asked for; return its exit code."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._enter is not None:
            self._enter(request, fds, self._warm)
        keep_only({0, 1, 2, *fds})
        become(request.get("environment", {}))
        os.chdir(request.get("cwd", "/"))
        reseed()
        if request.get("kind") == "zygote":
            wire = Wire(socket.socket(fileno=fds[0]))
            spec = Spec.parse(request["spec"])
            return build(wire, spec, lambda: self._warm.with_model(request["size"], *fds[1:]), self._fork, self._enter)
        from runtime.worker import worker

        name_process("worker")
        listener, line, *connections = fds
        return worker.serve(
            listener, line, request["start_id"], request.get("spans", []), self._warm, why=request.get("why", ""),
            connections=connections,
        )  # fmt: skip


class Unfit(Exception):
    """A process that must not be forked; the text says why."""


def seal() -> None:
    """Prepare this process's memory for forks.

    The garbage collector gets nothing to write to: a child's collection would copy every page that it looks at. Memory
    is gathered in pages of 2 MiB: a fork copies an entry for each page, and becomes four times as fast. Pages that a
    child writes to are copied in pieces of 4 KiB all the same.
    """
    gc.disable()
    gc.collect()
    gc.freeze()
    kernel.collapse()


def reseed() -> None:
    """Seed random generators anew, in a child: else every child would draw the same numbers.

    `uuid`, `secrets` and OpenSSL need nothing: they ask the kernel, or notice the fork.
    """
    random.seed()
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed(int.from_bytes(os.urandom(4), "little"))
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(int.from_bytes(os.urandom(7), "little"))


def become(environment: dict[str, str]) -> None:
    """Make `environment` the environment of this process; variables that are equal already are not written."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def keep_only(fds: set[int]) -> None:
    """Close every other fd of this process."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in fds:
            with contextlib.suppress(OSError):  # the fd of the listing itself is closed already
                os.close(int(name))


def name_process(what: str) -> None:
    """Set the name that `ps` and the kernel's messages show: `glowplug-` and `what`, 15 characters at most."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"glowplug-{what}"[:15].encode(), 0, 0, 0)


def _live(life: Callable[[], int]) -> None:
    """Run a child to its end: it must never return into the zygote's loop, whatever happens."""
    code = 70
    try:
        code = life()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def build(
    wire: Wire, spec: Spec, make: Callable[[], Warm], fork: Fork | None = None, enter: Enter | None = None
) -> int:
    """Build a layer, and serve it until its supervisor is gone; return the exit code."""
    since = time.monotonic_ns()
    kernel.dumpable(False)  # closed to processes of the same user
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    name_process("zygote")
    try:
        warm = make()
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(Gone):
            wire.send({"failed": f"{type(error).__name__}: {error}"})
        return 70
    ForkServer(wire, warm, spec.key, fork=fork, enter=enter).run(since)
    return 0


def main(arguments: list[str]) -> int:
    os.set_inheritable(int(arguments[0]), False)
    spec = Spec.parse(arguments[1])
    wire = Wire(socket.socket(fileno=int(arguments[0])))
    return build(wire, spec, lambda: Warm.lang(spec.kinds, lean=spec.lean))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
