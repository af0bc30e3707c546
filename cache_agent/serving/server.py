"""Owns the agent's sockets: who may connect, a thread for each connection, and the end of all of them."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cache_agent.access.control import Access
from cache_agent.errors import BadSetting
from cache_agent.handoff.broker import Broker
from cache_agent.serving.agent import Agent
from cache_agent.serving.connection import Connection
from cache_agent.snapshots.index import SnapshotIndex, open_index

log = logging.getLogger("glowplug.server")

_JOIN_SECONDS = 5.0
_BACKLOG = 256


def listen(path: Path, mode: int) -> socket.socket:
    """A listening unix socket at `path`, replacing one that nobody serves. Raises `BadSetting`."""
    server = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        old = os.umask(0o777 & ~mode)  # a mode set after bind would leave an instant in which anyone can connect
        try:
            server.bind(str(path))
        finally:
            os.umask(old)
        server.listen(_BACKLOG)
    except OSError as error:
        server.close()
        raise BadSetting(f"cannot listen on {path}: {error.strerror or error}; choose another --socket") from error
    except BadSetting:
        server.close()
        raise
    return server


def _remove_stale(path: Path) -> None:
    """Removes a socket on which nobody listens. Raises `BadSetting` when somebody does, however busy, or it is none."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadSetting(f"{path} exists and is no socket; choose another --socket")
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full
        raise BadSetting(f"an agent already serves {path}; stop it, or choose another --socket")


Opener = Callable[[socket.socket], Connection]


class Server:
    """Accepts connections until `stop`; `run` returns once every connection's thread has ended.

    A byte written to `stop_fd` stops it, too: it is made for `signal.set_wakeup_fd`, and knows SIGHUP's.
    """

    def __init__(
        self, agent: Agent, sock: socket.socket, access: Access | None = None, *, index: SnapshotIndex | None = None
    ) -> None:
        """Without `access` every client that can open the socket may do everything.

        Without an `index` requests are kept in this process.
        """
        self._agent = agent
        self._access = access or Access()
        self._doors: dict[int, tuple[socket.socket, Opener, int]] = {}
        index, allowed = index or open_index(agent.config, private=True), self._access
        self.desk = desk = Broker(index, agent.journal, agent.node)
        self.open_door(
            sock, lambda sock: Connection(agent, sock, allowed, self.forget, desk), agent.config.max_connections
        )
        self._stop_reader, self.stop_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()

    def open_door(self, sock: socket.socket, opener: Opener, most: int) -> None:
        """Before `run`: connections that come in at `sock` are served by what `opener` makes of them.

        Refused where `most` connections, of whatever door, are open.
        """
        sock.setblocking(False)
        self._doors[sock.fileno()] = sock, opener, most

    def run(self) -> None:
        poller = select.poll()
        for fd in (*self._doors, self._stop_reader):
            poller.register(fd, select.POLLIN)
        while self._stop_reader not in (ready := [fd for fd, _ in poller.poll()]) or not self._is_told_to_stop():
            for fd in ready:
                if fd in self._doors:
                    self._accept(*self._doors[fd])
        for sock, _, _ in self._doors.values():
            sock.close()
        for connection in self._snapshot():
            connection.stop()
        deadline = time.monotonic() + _JOIN_SECONDS
        for connection in self._snapshot():
            connection.thread.join(max(0.0, deadline - time.monotonic()))

    def _is_told_to_stop(self) -> bool:
        """False when all that came was SIGHUP, which has the rights read again."""
        with contextlib.suppress(BlockingIOError):
            if set(os.read(self._stop_reader, 64)) == {signal.SIGHUP}:
                self._access.reload()
                return False
        return True

    def stop(self) -> None:
        """Makes `run` return soon; from any thread, and as often as one likes."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.stop_fd, b".")

    def close(self) -> None:
        """Call it once, after `run`."""
        os.close(self._stop_reader)
        os.close(self.stop_fd)

    def _accept(self, door: socket.socket, opener: Opener, most: int) -> None:
        try:
            sock, _ = door.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of fds: those who are here must go on, and new ones wait in the backlog
            log.error("cannot accept a connection: %s", error.strerror)
            time.sleep(0.1)
            return
        self._admit(sock, opener, most)

    def _admit(self, sock: socket.socket, opener: Opener, most: int) -> None:
        with self._lock:
            if len(self._connections) >= most:
                log.warning("refused a connection: %d are open", len(self._connections))
                sock.close()
                return
        try:
            connection = opener(sock)
        except OSError as error:  # out of fds: this client must try again
            log.error("cannot serve a connection: %s", error)
            sock.close()
            return
        with self._lock:
            self._connections.add(connection)
        try:
            connection.thread.start()
        except RuntimeError as error:  # out of threads
            log.error("cannot serve a connection: %s", error)
            self.forget(connection)
            connection.close()

    def forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _snapshot(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)
