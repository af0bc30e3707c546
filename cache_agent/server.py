"""Owns the agent's socket: one thread per connection turns frames into calls of `Agent` and its answers into frames."""

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
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from cache_agent import __version__, manifest
from cache_agent.access.audit import Trail
from cache_agent.access.control import Access
from cache_agent.agent import Agent
from cache_agent.errors import AgentError, BadConfig, InternalError, ProtocolError, VersionMismatch
from cache_agent.handoff.desk import Asked, Desk
from cache_agent.loading.loader import Load
from cache_agent.policy.rights import NOBODY, Grant
from cache_agent.residency import report
from cache_agent.snapshots import shelf as shelves
from cache_agent.snapshots.shelf import Shelf
from cache_agent.tiers.dram import sealed_bytes
from cache_agent.wire.fdsocket import Channel, Disconnected
from cache_agent.wire.message import TEXT_LIMIT, Message
from cache_agent.wire.messages import (
    AnyMessage,
    ClusterRequest,
    ErrorReply,
    EstimateRequest,
    EventsReply,
    EventsRequest,
    EvictRequest,
    Hello,
    LeaseRequest,
    ManifestReply,
    ManifestRequest,
    Offer,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    Progress,
    PushDrain,
    PushDrainReply,
    Start,
    Started,
    StartedReply,
    StartsReply,
    StartsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
)
from cache_agent.wire.protocol import VERSION

log = logging.getLogger("glowplug.server")

_HELLO_SECONDS = 10.0
_JOIN_SECONDS = 5.0
_PROGRESS_SECONDS = 0.02
_BACKLOG = 256
_STRANGE = ("new", "greeting", "challenged", "answering")  # states of those who have not shown who they are


def listen(path: Path, mode: int) -> socket.socket:
    """A listening unix socket at `path`, replacing one that nobody serves. Raises `BadConfig`."""
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
        raise BadConfig(f"cannot listen on {path}: {error.strerror or error}; choose another --socket") from error
    except BadConfig:
        server.close()
        raise
    return server


def _remove_stale(path: Path) -> None:
    """Removes a socket on which nobody listens. Raises `BadConfig` when somebody does, however busy, or it is none."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadConfig(f"{path} exists and is no socket; choose another --socket")
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full
        raise BadConfig(f"an agent already serves {path}; stop it, or choose another --socket")


Opener = Callable[[socket.socket], "Connection"]


class Server:
    """Accepts connections until `stop`; `run` returns once every connection's thread has ended.

    A byte written to `stop_fd` stops it, too: it is made for `signal.set_wakeup_fd`, and knows SIGHUP's.
    """

    def __init__(
        self, agent: Agent, sock: socket.socket, access: Access | None = None, *, shelf: Shelf | None = None
    ) -> None:
        """Without `access` whoever can open the socket may do everything; without a `shelf` requests are kept in this

        process.
        """
        self._agent = agent
        self._access = access or Access()
        self._doors: dict[int, tuple[socket.socket, Opener, int]] = {}
        kept, allowed = shelf or shelves.shelf(agent.config, private=True), self._access
        self.desk = desk = Desk(kept, agent.journal, agent.node)
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


class Connection:
    """One client. Its thread alone touches the socket; others leave messages in the outbox and wake it."""

    channel_type = Channel

    def __init__(
        self, agent: Agent, sock: socket.socket, access: Access, on_end: Callable[[Connection], None], desk: Desk
    ) -> None:
        self._agent = agent
        self._channel = self.channel_type(sock, of_agent=True)
        self._access = access
        self._trail = Trail(access, "")
        self._desk = desk
        self._on_end = on_end
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._outbox: deque[tuple[Message, list[int], Load | None]] = deque()
        self._closed = False
        self._stopping = False
        self._asked = 0
        self.pod = ""
        self.caller = NOBODY
        self._load: Load | None = None
        self._reported = -1
        self._report_at = 0.0
        self.thread = threading.Thread(target=self._run, name=f"connection-{sock.fileno()}", daemon=True)

    # --- for other threads ----------------------------------------------------------------------------------------

    @property
    def grant(self) -> Grant:
        return self._access.grant(self.caller)

    def deliver(self, message: Message, fds: list[int], load: Load | None = None) -> None:
        """Queues a message; `load` is what its progress reports will be about."""
        with self._lock:
            if not self._closed:
                self._outbox.append((message, fds, load))
                os.eventfd_write(self._wake_fd, 1)
                return
        for fd in fds:
            os.close(fd)

    def wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        self._stopping = True
        self.wake()

    # --- the connection's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Disconnected as error:
            log.debug("connection ended: %s", error)
        except AgentError as error:
            log.warning("closing a connection: %s", error)
            with contextlib.suppress(Disconnected, ProtocolError):
                self._say(ErrorReply(error.code, error.text[:TEXT_LIMIT]))
        except Exception:
            log.exception("connection failed")
        finally:
            if self._load is not None:
                self._load.unwatch(self.wake)
            self._trail.gone(self.caller)
            self._desk.gone(self)
            if self._asked:
                self._agent.release(self._asked)
            self.close()
            self._on_end(self)

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        greet_by = time.monotonic() + _HELLO_SECONDS
        while not self._stopping:
            strange = self._channel.state in _STRANGE
            timeout = max(0.0, greet_by - time.monotonic()) if strange else self._timeout()
            events = dict(poller.poll(None if timeout is None else timeout * 1000))
            if self._channel.state in _STRANGE and time.monotonic() >= greet_by:
                raise ProtocolError(f"no hello came within {_HELLO_SECONDS:.0f} s")
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            self._send_outbox()
            self._push()
            if self._channel.fileno() in events:
                while (received := self._channel.poll()) is not None:
                    self._answer(*received)

    def _send_outbox(self) -> None:
        while True:
            with self._lock:
                if not self._outbox:
                    return
                message, fds, load = self._outbox.popleft()
            try:
                self._say(message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            if isinstance(message, ErrorReply) and self._channel.state == "closed":
                raise Disconnected("refused")
            if load is not None:
                self._load = load
                load.watch(self.wake)

    def _say(self, message: Message, fds: Sequence[int] = ()) -> None:
        # First the record: whoever has the answer finds the line.
        self._trail.answered(self.caller, message)
        self._channel.send(message, fds)

    def _timeout(self) -> float | None:
        """Seconds until there may be something to push, though nobody wakes this thread."""
        now = time.monotonic()
        return self._report_at - now if self._load is not None and self._report_at > now else None

    def _push(self) -> None:
        """What is said without being asked for."""
        if self._load is None or self._channel.state != "loading" or time.monotonic() < self._report_at:
            return
        ready, done = self._load.progress()
        if done != self._reported:
            self._reported = done
            self._report_at = time.monotonic() + _PROGRESS_SECONDS
            self._channel.send(Progress(ready, done, self._load.total))

    def _answer(self, message: AnyMessage, fds: list[int]) -> None:
        if isinstance(message, Hello):
            self._greet(message)
            return
        self._trail.asked(message)
        try:
            self._require(message, fds)
            match message:
                case LeaseRequest(model):
                    self._asked = self._agent.lease(self, model)
                case Offer(model, source):
                    self._asked = self._agent.offer(self, model, source, fds)
                case EvictRequest(model, from_ssd):
                    self._agent.evict(self, model, from_ssd)
                case PinRequest(model, pinned):
                    self._agent.pin(self, model, pinned)
                case PrefetchRequest(model):
                    self._agent.prefetch(model)
                    self._say(PrefetchReply())
                case StatusRequest():
                    self._say(self._status())
                case EstimateRequest(model):
                    self._say(self._agent.estimate(model))
                case ManifestRequest(model):
                    self._send_manifest(model)
                case PushDrain(reason, grace, model):
                    self._say(PushDrainReply(self._agent.push_drain(reason, grace, model)))
                case Started():
                    self._agent.started(message)
                    self._say(StartedReply())
                case EventsRequest(since):
                    self._say(EventsReply(self._agent.journal.since(since)))
                case StartsRequest():
                    self._say(StartsReply(self._starts()))
                case ClusterRequest():
                    self._say(self._agent.cluster())
                case _ if isinstance(message, Asked):
                    self._desk.answer(self, message, fds, self._say)
                case _:
                    raise ProtocolError(f"'{type(message).__name__}' is a message of the agent's side")
        except (ProtocolError, Disconnected):
            raise
        except AgentError as error:
            self._refuse(error)
        except Exception as error:
            log.exception("answering %s failed", type(message).__name__)
            self._refuse(InternalError(f"the agent failed ({error!r}); its log has the traceback, please report it"))

    def _require(self, message: AnyMessage, fds: list[int]) -> None:
        """Before anything else, so that a refusal takes no longer for a model that is here. Closes `fds` then.

        Raises `AccessDenied`, or `BadModelURI` for what is none.
        """
        try:
            match message:
                case EvictRequest() | PinRequest() | PushDrain() | EventsRequest() | ClusterRequest():
                    self._access.require_admin(self.caller, f"'{message.__struct_config__.tag}'")
                case LeaseRequest(model) | Offer(model) | PrefetchRequest(model):
                    self._access.require_model(self.caller, model)
                case EstimateRequest(model) | ManifestRequest(model):
                    self._access.require_model(self.caller, model)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _starts(self) -> list[Start]:
        return [start for start in self._agent.starts.recent() if self._access.may_have(self.caller, start.model)]

    def _status(self) -> StatusReply:
        reply = self._agent.full_status()
        if self.grant.admin:
            return reply
        return report.visible(reply, lambda model: self._access.may_have(self.caller, model))

    def _refuse(self, error: AgentError) -> None:
        self._say(ErrorReply(error.code, error.text[:TEXT_LIMIT]))
        if self._channel.state == "closed":
            raise Disconnected("refused")

    def _greet(self, hello: Hello) -> None:
        if hello.version != VERSION:
            raise VersionMismatch(
                f"the client speaks protocol {hello.version}, this agent {VERSION}: update the older of the two"
            )
        self.caller = self._access.identify(hello.identity, hello.client)
        self._trail = Trail(self._access, hello.client)
        self.pod = self.caller.pod or hello.pod
        self._channel.send(Welcome(VERSION, self._agent.node, __version__))

    def _send_manifest(self, model: str) -> None:
        data = manifest.encode(self._agent.describe(model))
        fd = sealed_bytes(data, "glowplug:manifest")
        try:
            self._say(ManifestReply(len(data), 1), [fd])
        finally:
            os.close(fd)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            outbox, self._outbox = self._outbox, deque()
            os.close(self._wake_fd)
        for _, fds, _ in outbox:
            for fd in fds:
                os.close(fd)
        self._channel.close()
