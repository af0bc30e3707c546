"""A function's hold on one model's bytes, and the reading of what the agent says of them."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from cache_agent.errors import (
    AgentTimeout,
    LeaseLost,
    ProtocolError,
    from_wire,
)
from cache_agent.ledger import Span
from cache_agent.model import manifest as manifests
from cache_agent.model.manifest import Manifest
from cache_agent.wire.channel import Channel, Disconnected
from cache_agent.wire.message import Message
from cache_agent.wire.messages import (
    AnyMessage,
    Drain,
    ErrorReply,
    Granted,
    LeaseReady,
    Progress,
    RevisionNotice,
)

if TYPE_CHECKING:
    pass


M = TypeVar("M", bound=Message)


class Lease:
    """A hold on one model's bytes. The fds are read-only; mapping them before `wait_ready` shows bytes as they arrive.

    `segments` are fds in the manifest's order, `page` their page size in bytes. `revision` is "" until it is known.
    `fetched`: the bytes came into memory of this process's own. One thread at a time.
    """

    fetched = False

    def __init__(self, channel: Channel, granted: Granted, fds: list[int], known: KnownManifest | None = None) -> None:
        self._channel = channel
        self.manifest_fd, *self.segments = fds
        self.manifest_bytes = granted.manifest_bytes
        self.page = granted.page
        self.ready = False
        self.tier = ""
        self.revision = ""
        self.spans: list[Span] = []
        try:
            if known is not None and known.lies_in(self.manifest_fd, granted.manifest_bytes):
                self.manifest = known.manifest
            else:
                self.manifest = read_manifest(self.manifest_fd, granted.manifest_bytes)
            if list(self.manifest.segments) != granted.segments or len(self.segments) != len(granted.segments):
                raise ProtocolError("the agent granted other segments than its manifest has")
            for fd, size in zip(self.segments, granted.segments, strict=True):
                if os.fstat(fd).st_size != size:
                    raise ProtocolError("a segment is of another size than the agent says")
        except BaseException:
            self.close()
            raise

    def wait_ready(self, deadline: float, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Returns once all bytes are verified; `on_progress(done, total)` in bytes. `deadline` on time.monotonic.

        Raises `LeaseLost` when the agent goes away, `AgentTimeout`, or the agent's own error.
        """
        while not self.ready:
            message = self._next(deadline)
            if isinstance(message, Progress) and on_progress is not None:
                on_progress(message.done, message.total)

    def next_event(self, timeout: float) -> Drain | RevisionNotice | None:
        """What the agent pushes to a ready lease, or None after `timeout` seconds. Raises `LeaseLost`."""
        try:
            message = self._next(time.monotonic() + timeout)
        except AgentTimeout:
            return None
        return message if isinstance(message, (Drain, RevisionNotice)) else None

    def _next(self, deadline: float) -> AnyMessage:
        try:
            message, _ = self._channel.receive(deadline)
        except Disconnected as error:
            raise LeaseLost(f"the cache agent went away ({error}); it is asked again when it is back") from error
        match message:
            case ErrorReply(code, text):
                raise from_wire(code, text)
            case LeaseReady(tier, revision, spans):
                self.ready, self.tier, self.spans = True, tier, spans
                self.revision = revision or self.revision
            case RevisionNotice(revision):
                self.revision = revision
        return message

    def rejoin(self, channel: Channel) -> None:
        """Goes on over a connection on which these bytes were offered."""
        self._channel.close()
        self._channel = channel

    def interrupt(self) -> None:
        """From another thread: whoever waits for an event of this lease hears that it is over."""
        with contextlib.suppress(OSError):
            self._channel.sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Readable when an event waits, or the agent is gone."""
        return self._channel.fileno()

    def close(self) -> None:
        """Ends the lease; mappings of the segments stay valid."""
        self._channel.close()
        fds, self.segments = [self.manifest_fd, *self.segments], []
        self.manifest_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def expect(channel: Channel, kind: type[M], deadline: float) -> tuple[M, list[int]]:
    """The reply of this kind, and its fds. Raises the agent's error in place of it."""
    while True:
        message, fds = channel.receive(deadline)
        match message:
            case kind():
                return message, fds
            case ErrorReply(code, text):
                raise from_wire(code, text)
            case Drain():
                continue  # the lease is not even granted; whoever asked learns of it with the next one
            case _:
                for fd in fds:
                    os.close(fd)
                raise ProtocolError(f"the agent answered {type(message).__name__}, expected {kind.__name__}")


class KnownManifest:
    """A manifest that has been read, and its sealed memory, which stays mapped so that its number stays its own.

    Large vocabularies make manifests of megabytes: whoever was forked from a process that knows it need not read it.
    """

    def __init__(self, fd: int, size: int) -> None:
        """The fd stays the caller's. Raises `ProtocolError`."""
        self.manifest = read_manifest(fd, size)
        self._memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._place = _place(fd, size)

    def lies_in(self, fd: int, size: int) -> bool:
        return self._place == _place(fd, size)


def _place(fd: int, size: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, size


def read_manifest(fd: int, size: int) -> Manifest:
    """The manifest in the first `size` bytes of this fd. Raises `ProtocolError`."""
    if not 0 < size <= min(manifests.MAX_MANIFEST, os.fstat(fd).st_size):
        raise ProtocolError(f"the agent sent a manifest of an impossible size ({size} bytes)")
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as data, memoryview(data) as view:
        return manifests.decode(view)
