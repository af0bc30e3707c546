"""Owns one client's connection, whose thread turns frames into calls of `Agent` and the agent's replies into frames."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from cache_agent import __version__
from cache_agent.access.audit import Trail
from cache_agent.access.control import Access
from cache_agent.errors import AgentError, InternalError, ProtocolError, VersionMismatch
from cache_agent.handoff.broker import Broker, WorkerRequest
from cache_agent.loading.loader import ModelLoad
from cache_agent.model import manifest
from cache_agent.policy.rights import NOBODY, Permission
from cache_agent.residency import report
from cache_agent.serving.agent import Agent
from cache_agent.wire.blobs import sealed_bytes
from cache_agent.wire.channel import Channel, Disconnected
from cache_agent.wire.layers import LayersReport
from cache_agent.wire.message import TEXT_LIMIT, Message, tag_of
from cache_agent.wire.messages import (
    AnyMessage,
    ErrorReply,
    Hello,
    LeaseRequest,
    ManifestReply,
    ManifestRequest,
    Offer,
    Progress,
    Welcome,
)
from cache_agent.wire.operations import (
    ClusterRequest,
    EstimateRequest,
    EventsReply,
    EventsRequest,
    EvictRequest,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    PushDrain,
    PushDrainReply,
    Start,
    Started,
    StartedReply,
    StartsReply,
    StartsRequest,
    StatusReply,
    StatusRequest,
)
from cache_agent.wire.protocol import VERSION

log = logging.getLogger("glowplug.server")

_HELLO_SECONDS = 10.0
_PROGRESS_SECONDS = 0.02
_UNIDENTIFIED = ("new", "greeting", "challenged", "answering")  # states before a client has shown its identity


class Connection:
    """One client. Only the connection's thread touches the socket; other threads fill its outbox and wake it."""

    channel_type = Channel

    def __init__(
        self, agent: Agent, sock: socket.socket, access: Access, on_end: Callable[[Connection], None], broker: Broker
    ) -> None:
        self._agent = agent
        self._channel = self.channel_type(sock, of_agent=True)
        self._access = access
        self._trail = Trail(access, "")
        self._broker = broker
        self._on_end = on_end
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._outbox: deque[tuple[Message, list[int], ModelLoad | None]] = deque()
        self._closed = False
        self._stopping = False
        self._request = 0
        self.pod = ""
        self.caller = NOBODY
        self._load: ModelLoad | None = None
        self._reported = -1
        self._report_at = 0.0
        self.thread = threading.Thread(target=self._run, name=f"connection-{sock.fileno()}", daemon=True)

    # --- for other threads ----------------------------------------------------------------------------------------

    @property
    def permission(self) -> Permission:
        return self._access.permission(self.caller)

    def deliver(self, message: Message, fds: list[int], load: ModelLoad | None = None) -> None:
        """Queue a message, and take over `fds`. `load` is the load whose progress is reported from then on."""
        with self._lock:
            if not self._closed:
                self._outbox.append((message, fds, load))
                os.eventfd_write(self._wake_fd, 1)
                return
        for fd in fds:
            os.close(fd)

    def wake(self) -> None:
        """Let the connection's thread look for messages and progress."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Let the connection's thread end."""
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
                self._send(ErrorReply(error.code, error.text[:TEXT_LIMIT]))
        except Exception:
            log.exception("connection failed")
        finally:
            if self._load is not None:
                self._load.unwatch(self.wake)
            self._trail.gone(self.caller)
            self._broker.forget(self)
            if self._request:
                self._agent.release(self._request)
            self.close()
            self._on_end(self)

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        greet_by = time.monotonic() + _HELLO_SECONDS
        while not self._stopping:
            unidentified = self._channel.state in _UNIDENTIFIED
            timeout = max(0.0, greet_by - time.monotonic()) if unidentified else self._timeout()
            events = dict(poller.poll(None if timeout is None else timeout * 1000))
            if self._channel.state in _UNIDENTIFIED and time.monotonic() >= greet_by:
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
                self._send(message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            if isinstance(message, ErrorReply) and self._channel.state == "closed":
                raise Disconnected("refused")
            if load is not None:
                self._load = load
                load.watch(self.wake)

    def _send(self, message: Message, fds: Sequence[int] = ()) -> None:
        # The audit line is written first, so that it is there once the client has its answer.
        self._trail.answered(self.caller, message)
        self._channel.send(message, fds)

    def _timeout(self) -> float | None:
        """Return the seconds until a push is due that no wake-up announces; None where none is."""
        now = time.monotonic()
        return self._report_at - now if self._load is not None and self._report_at > now else None

    def _push(self) -> None:
        """Send what the client gets without a request: progress of its load."""
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
                    self._request = self._agent.lease(self, model)
                case Offer(model, source):
                    self._request = self._agent.offer(self, model, source, fds)
                case EvictRequest(model, from_ssd):
                    self._agent.evict(self, model, from_ssd)
                case PinRequest(model, pinned):
                    self._agent.pin(self, model, pinned)
                case PrefetchRequest(model):
                    self._agent.prefetch(model)
                    self._send(PrefetchReply())
                case StatusRequest():
                    self._send(self._status())
                case EstimateRequest(model):
                    self._send(self._agent.estimate(model))
                case ManifestRequest(model):
                    self._send_manifest(model)
                case PushDrain(reason, grace, model):
                    self._send(PushDrainReply(self._agent.push_drain(reason, grace, model)))
                case Started() | LayersReport():
                    self._agent.reports.add(message)
                    self._send(StartedReply())
                case EventsRequest(since):
                    self._send(EventsReply(self._agent.journal.since(since)))
                case StartsRequest():
                    self._send(StartsReply(self._starts()))
                case ClusterRequest():
                    self._send(self._agent.cluster())
                case _ if isinstance(message, WorkerRequest):
                    self._broker.answer(self, message, fds, self._send)
                case _:
                    raise ProtocolError(f"'{tag_of(type(message))}' is a message of the agent's side")
        except (ProtocolError, Disconnected):
            raise
        except AgentError as error:
            self._refuse(error)
        except Exception as error:
            log.exception("answering %s failed", tag_of(type(message)))
            self._refuse(InternalError(f"the agent failed ({error!r}); its log has the traceback, please report it"))

    def _require(self, message: AnyMessage, fds: list[int]) -> None:
        """Check the caller's rights before anything else: a refusal must not take longer for a resident model.

        Raises `AccessDenied` or `BadModelURI`, and closes `fds` then.
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
        return [
            start for start in self._agent.reports.starts.recent() if self._access.may_have(self.caller, start.model)
        ]

    def _status(self) -> StatusReply:
        reply = self._agent.full_status()
        if self.permission.admin:
            return reply
        return report.visible(reply, lambda model: self._access.may_have(self.caller, model))

    def _refuse(self, error: AgentError) -> None:
        self._send(ErrorReply(error.code, error.text[:TEXT_LIMIT]))
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
            self._send(ManifestReply(len(data), 1), [fd])
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the socket and all fds that wait to be sent. For the connection's thread, or once it cannot start."""
        with self._lock:
            self._closed = True
            outbox, self._outbox = self._outbox, deque()
            os.close(self._wake_fd)
        for _, fds, _ in outbox:
            for fd in fds:
                os.close(fd)
        self._channel.close()
