"""Owns the zygotes of a node, and serves containers that connect to its socket: a supervisor for all of them.

To a container's shim the pool looks like a zygote (see wire.py): it says `ready`, beats, forks on request, and tells
how what it forked has ended. Who asks is known by the pidfd that the kernel gives of it (`SO_PEERPIDFD`), not by what
it says: only the first process of a container is served, one worker at a time, and always into that very container.

It is a subreaper, so that workers whose zygote died are its own, and nothing that it waits for can keep it from
reaping: a container only terminates once the last of its processes has been.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.children import reap
from runtime.zygote import join, kernel
from runtime.zygote.forkserver import BEAT
from runtime.zygote.join import Place
from runtime.zygote.published import Published
from runtime.zygote.spawn import Ended, Forked, Lost, Ready, Refused, Spec, Zygote, boot
from runtime.zygote.wire import Gone, Wire

PROGRAM = ("-m", "runtime.zygote.placed")
_PR_SET_CHILD_SUBREAPER = 36
_REBUILD = 5.0  # seconds before a zygote that was lost is built again
_BACKLOG = 256
_CLIENTS = 1024
_STDIO = 3


@dataclass(slots=True, eq=False)
class Client:
    """A container's shim. `worker` is the pid of its worker outside, 0 while it has none."""

    wire: Wire
    pidfd: int
    place: Place
    asked: int | None = None  # the number of its request that is under way
    worker: int = 0
    inner: int = 0  # the worker's pid as the container sees it
    worker_pidfd: int = -1
    greeted: bool = False
    since: float = field(default_factory=time.monotonic)


class Pool:
    """`run()` serves until SIGTERM."""

    def __init__(self, path: str, spec: Spec, *, say: Callable[[str], None], seccomp: str = "") -> None:
        self._path, self._spec, self._say, self._seccomp = path, spec, say, seccomp
        self._zygote: Zygote | None = None
        self._ready: Ready | None = None
        self._rebuild_at = 0.0
        self._clients: dict[int, Client] = {}  # by fd
        self._requests: dict[int, Client] = {}  # by the number that the zygote knows
        self._number = 0
        self._stopping = False
        self._published = Published("pool", path, 0.0)

    def run(self) -> int:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        kernel.dumpable(False)
        listener = self._listen()
        wake, end = socket.socketpair()
        for each in (wake, end):
            each.setblocking(False)
        signal.set_wakeup_fd(end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        beat_at = 0.0
        try:
            while not self._stopping:
                poller = select.poll()
                poller.register(wake, select.POLLIN)
                if len(self._clients) < _CLIENTS:
                    poller.register(listener, select.POLLIN)
                for fd, client in self._clients.items():
                    poller.register(fd, select.POLLIN | (select.POLLOUT if client.wire.waiting else 0))
                if self._zygote is not None:
                    poller.register(self._zygote.wire, select.POLLIN)
                ready = {fd for fd, _ in poller.poll(BEAT * 1000)}
                with contextlib.suppress(BlockingIOError):
                    wake.recv(4096)
                self._reap()
                self._tend(time.monotonic())
                self._published.write(self._report(), time.monotonic())
                if listener.fileno() in ready:
                    self._accept(listener)
                for fd in ready & self._clients.keys():
                    self._hear(self._clients[fd])
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + BEAT
                    for client in list(self._clients.values()):
                        self._tell(client, {"beat": 1})
        finally:
            self._published.close()
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            for client in list(self._clients.values()):
                self._forget(
                    client, ended=False
                )  # workers go on; a pool that comes after this one serves the next start
            if self._zygote is not None:
                self._zygote.kill()
        return 0

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _listen(self) -> socket.socket:
        """Everybody on the node may connect; who is served is decided by who connects."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(self._path).st_mode):
                os.unlink(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self._path)
        os.chmod(self._path, 0o666)  # noqa: S103  functions have users of their own
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        return listener

    # --- zygotes --------------------------------------------------------------------------------------------------

    def _tend(self, now: float) -> None:
        """Has a zygote, and hears what it says."""
        if self._zygote is None:
            if now >= self._rebuild_at:
                variables = {**os.environ, "GLOWPLUG_POOL_SECCOMP": self._seccomp}
                self._zygote = boot(self._spec, environment=variables, program=PROGRAM)
            return
        zygote = self._zygote
        if why := zygote.overdue(now):
            zygote.kill()
            self._lost(f"{why} and was killed")
            return
        for event in zygote.read():
            match event:
                case Ready():
                    self._ready = event
                    self._say(f"the {event.level} layer is ready: {event.seconds:.2f} s, {event.bytes / 1e6:.0f} MB")
                    for client in list(self._clients.values()):
                        self._greet(client)
                case Forked():
                    self._forked(event)
                case Refused():
                    if (asking := self._requests.pop(event.number, None)) is not None:
                        self._refuse(asking, event.why)
                case Ended():
                    self._ended(event.pid, event.status)
                case Lost():
                    self._lost(event.why)
                    return

    def _lost(self, why: str) -> None:
        self._say(f"a zygote was lost: {why}; another is built in {_REBUILD:.0f} s")
        if self._zygote is not None:
            self._zygote.close()
        self._zygote, self._ready = None, None
        self._rebuild_at = time.monotonic() + _REBUILD
        for client in self._requests.values():
            self._refuse(client, f"the pool's zygote was lost: {why}")
        self._requests.clear()

    def _reap(self) -> None:
        """Zygotes, and workers whose zygote has died."""
        for pid, status in reap().items():
            self._ended(pid, status)

    def _forked(self, event: Forked) -> None:
        client = self._requests.pop(event.number, None)
        if client is None or client.wire.fileno() not in self._clients:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(event.pidfd, signal.SIGKILL)  # whoever asked for it is gone
            os.close(event.pidfd)
            return
        client.worker, client.worker_pidfd, client.inner = event.pid, event.pidfd, _inner(event.pid)
        self._tell(client, {"forked": client.asked, "pid": client.inner}, [event.pidfd])
        client.asked = None

    def _ended(self, pid: int, status: int) -> None:
        for client in self._clients.values():
            if client.worker == pid:
                inner = client.inner
                os.close(client.worker_pidfd)
                client.worker, client.inner, client.worker_pidfd = 0, 0, -1
                self._tell(client, {"ended": inner, "status": status})
                return

    def _report(self) -> list[dict[str, Any]]:
        """For people; see published.py."""
        workers = sum(bool(client.worker) for client in self._clients.values())
        if self._ready is None:
            return [{"level": "lang", "state": "building", "since": None}]
        ready = self._ready
        why = f"held for all containers of the node: {len(self._clients)} are connected, {workers} have a worker"
        held = {"level": ready.level, "state": "used" if workers else "idle", "since": None}
        return [{**held, "seconds": ready.seconds, "bytes": ready.bytes, "why": why}]

    # --- containers -----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = listener.accept()
            wire = Wire(sock)
            try:
                pidfd = sock.getsockopt(socket.SOL_SOCKET, kernel.SO_PEERPIDFD)
            except OSError:
                self._deny(wire, "this kernel does not say who connects (SO_PEERPIDFD, Linux 6.5)")
                return
            try:
                place = join.look(pidfd)
                if place.filtered and not self._seccomp:
                    raise join.Refused("its container has a seccomp filter, and the pool was given none")
                if any(other.place.container == place.container for other in self._clients.values()):
                    raise join.Refused("its container is served already")
            except join.Refused as refused:
                os.close(pidfd)
                self._deny(wire, str(refused))
                return
            client = Client(wire, pidfd, place)
            self._clients[wire.fileno()] = client
            self._greet(client)

    def _deny(self, wire: Wire, why: str) -> None:
        with contextlib.suppress(Gone):
            wire.send({"failed": why})
        wire.close()

    def _greet(self, client: Client) -> None:
        if self._ready is not None and not client.greeted:
            client.greeted = True
            ready = self._ready
            self._tell(client, {"ready": ready.level, "key": ready.key, "seconds": ready.seconds, "bytes": ready.bytes})

    def _hear(self, client: Client) -> None:
        try:
            client.wire.flush()
            while (received := client.wire.receive()) is not None:
                message, fds = received
                try:
                    self._ask(client, message, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except Gone:
            self._forget(client)

    def _ask(self, client: Client, message: dict[str, Any], fds: list[int]) -> None:
        """Passes a request on, if it is one that a shim may make. Whatever else it says is not passed on."""
        match message:
            case {
                "fork": int(number), "kind": "worker", "environment": dict(environment), "cwd": str(cwd),
                "start_id": str(start_id), "spans": str(spans), "why": str(why),
            } if len(fds) >= 2 + _STDIO:  # fmt: skip
                pass
            case _:
                raise Gone("no request that a shim makes")
        if client.worker or client.asked is not None:
            self._tell(client, {"refused": number, "why": "its container has a worker"})
            return
        if self._zygote is None or self._ready is None:
            self._tell(client, {"refused": number, "why": "no zygote of the pool is ready"})
            return
        try:
            root = os.open(f"/proc/{client.place.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self._tell(client, {"refused": number, "why": f"its root cannot be opened ({error.strerror})"})
            return
        try:
            if not join.lives(client.pidfd):
                raise Gone("it has ended")
            self._number += 1
            self._requests[self._number] = client
            client.asked = number
            request = {
                "fork": self._number, "kind": "worker", "environment": environment, "cwd": cwd, "start_id": start_id,
                "spans": spans, "why": why, "place": client.place.dump(),
            }  # fmt: skip
            try:
                self._zygote.wire.send(request, [*fds, client.pidfd, root])
            except Gone:
                self._lost("it went away")
        finally:
            os.close(root)

    def _refuse(self, client: Client, why: str) -> None:
        number, client.asked = client.asked, None
        if client.wire.fileno() in self._clients:
            self._tell(client, {"refused": number, "why": why})

    def _tell(self, client: Client, message: dict[str, Any], fds: list[int] | None = None) -> None:
        try:
            client.wire.send(message, fds or [])
        except Gone:
            self._forget(client)

    def _forget(self, client: Client, *, ended: bool = True) -> None:
        """Its shim has `ended`, and so will the container; a worker that is left has nobody to serve for."""
        if self._clients.pop(client.wire.fileno(), None) is None:
            return
        if client.worker_pidfd >= 0:
            if ended:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(client.worker_pidfd, signal.SIGKILL)
            os.close(client.worker_pidfd)
        client.wire.close()
        os.close(client.pidfd)


def _inner(pid: int) -> int:
    """A process's number in its own pid namespace."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid
