"""A lease on one model's bytes, and the reading of the agent's replies and manifests."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from cache_agent.errors import AgentTimeout, LeaseLost, ProtocolError, from_wire
from cache_agent.ledger import Span
from cache_agent.model import manifest as manifests
from cache_agent.model.manifest import Manifest
from cache_agent.wire.channel import Channel, Disconnected
from cache_agent.wire.message import Message, tag_of
from cache_agent.wire.messages import (
    AnyMessage,
    Drain,
    ErrorReply,
    Granted,
    LeaseReady,
    Progress,
    RevisionNotice,
)

M = TypeVar("M", bound=Message)


class Lease:
    """A lease on one model's bytes, in read-only fds. Mapped before `wait_ready` they show bytes as they arrive.

    `segments` are the fds in the manifest's order, `page` is their page size in bytes. `revision` is "" until it is
    known. `fetched` says that the bytes are in this process's own memory. One thread at a time.
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
        """Return once all bytes are verified. `on_progress(done, total)` is in bytes, `deadline` of time.monotonic.

        Raises `LeaseLost` when the agent goes away, `AgentTimeout`, or the agent's own error.
        """
        while not self.ready:
            message = self._next(deadline)
            if isinstance(message, Progress) and on_progress is not None:
                on_progress(message.done, message.total)

    def next_event(self, timeout: float) -> Drain | RevisionNotice | None:
        """Return the agent's next message to a ready lease, or None after `timeout` seconds. Raises `LeaseLost`."""
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
        """Replace the connection by one on which these bytes were offered to another agent."""
        self._channel.close()
        self._channel = channel

    def interrupt(self) -> None:
        """End the connection from another thread, so that `wait_ready` and `next_event` raise `LeaseLost`."""
        with contextlib.suppress(OSError):
            self._channel.sock.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return an fd that is readable when an event waits or the agent has gone."""
        return self._channel.fileno()

    def close(self) -> None:
        """End the lease; mappings of the segments stay valid."""
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
    """Receive a reply of this kind and its fds. Raises the agent's error where one comes instead."""
    while True:
        message, fds = channel.receive(deadline)
        match message:
            case kind():
                return message, fds
            case ErrorReply(code, text):
                raise from_wire(code, text)
            case Drain():
                continue  # a process whose lease is not granted yet has nothing to hand over
            case _:
                for fd in fds:
                    os.close(fd)
                raise ProtocolError(f"the agent answered {tag_of(type(message))}, expected {tag_of(kind)}")


class KnownManifest:
    """A decoded manifest with its sealed memory. The mapping keeps the memory's inode from being reused.

    Large vocabularies make manifests of megabytes; a process that is forked with a decoded one need not read it again.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Read the manifest in `fd`, which stays the caller's. Raises `ProtocolError`."""
        self.manifest = read_manifest(fd, size)
        self._memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._place = _place(fd, size)

    def lies_in(self, fd: int, size: int) -> bool:
        """Return whether `fd` is the same memory."""
        return self._place == _place(fd, size)


def _place(fd: int, size: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, size


def read_manifest(fd: int, size: int) -> Manifest:
    """Return the manifest in the first `size` bytes of this fd. Raises `ProtocolError`."""
    if not 0 < size <= min(manifests.MAX_MANIFEST, os.fstat(fd).st_size):
        raise ProtocolError(f"the agent sent a manifest of an impossible size ({size} bytes)")
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as data, memoryview(data) as view:
        return manifests.decode(view)
