"""Owns a lease whose bytes come over TCP into memory of the function's own.

A thread receives the bytes as the agent verifies them, while the function imports and builds. Complete memory is
sealed, like the agent's.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cache_agent.client.lease import Lease, expect, read_manifest
from cache_agent.errors import AgentError, AgentTimeout, LeaseLost, ProtocolError, from_wire
from cache_agent.model import manifest as manifests
from cache_agent.model.manifest import Manifest
from cache_agent.tiers.dram import Dram
from cache_agent.wire.blobs import sealed_bytes
from cache_agent.wire.channel import Disconnected
from cache_agent.wire.link import Link
from cache_agent.wire.messages import ErrorReply, LeaseReady, LeaseRequest, StreamedPiece, Streaming

_PIECE_SECONDS = 30.0  # without a byte, once a piece has begun
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MESSAGE_SECONDS = 600.0  # without a message: the origin may be slow, or the agent may be verifying the bytes


def receive_manifest(link: Link, streaming: Streaming) -> Manifest:
    """Receive the manifest that follows the frame. Raises `Disconnected`, `ProtocolError`."""
    if streaming.body > manifests.MAX_MANIFEST:
        raise ProtocolError(f"the agent sent a manifest of an impossible size ({streaming.body} bytes)")
    found = manifests.decode(link.read(streaming.body, _PIECE_SECONDS))
    if list(found.segments) != streaming.segments or found.source != streaming.source:
        raise ProtocolError("the agent grants other segments than its manifest has")
    return found


class Leftover(NamedTuple):
    """The memory of an earlier lease over TCP: fds of its manifest and its segments, which stay the caller's.

    `drop` is called before other memory is taken, when the fds turn out to be of no use.
    """

    manifest: int
    segments: Sequence[int]
    drop: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, fds: Sequence[int], drop: Callable[[], None] = lambda: None) -> Leftover | None:
        """Build a leftover from fds, the manifest's first; None where there are no fds."""
        return cls(fds[0], fds[1:], drop) if fds else None


def lease(link: Link, model: str, start_id: str, deadline: float, leftover: Leftover | None) -> StreamedLease | None:
    """Take a lease whose bytes are `leftover` where the model is still the same, and come over the link otherwise.

    None where the model is the same and the agent lays it out differently: the leftover is dropped then, and the
    caller asks again without it. Raises the agent's errors.
    """
    known = _leftover_manifest(leftover) if leftover is not None else None
    link.send(LeaseRequest(model, start_id, have=known.source if known is not None else ""))
    manifest = receive_manifest(link, expect(link, Streaming, deadline)[0])
    if leftover is not None and known == manifest:
        return StreamedLease(link, manifest, Dram.adopted(leftover.segments), whole=True)
    if leftover is not None:
        leftover.drop()
    if known is not None and known.source == manifest.source:  # the agent sends nothing to a client that has the source
        return None
    return StreamedLease(link, manifest, Dram(manifest.segments, name="glowplug:streamed"))


def _leftover_manifest(leftover: Leftover) -> Manifest | None:
    """Return the manifest of leftover memory; None unless all of it is there and sealed."""
    try:
        found = read_manifest(leftover.manifest, os.fstat(leftover.manifest).st_size)
        sizes = [os.fstat(fd).st_size for fd in leftover.segments]
        sealed = all(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS for fd in leftover.segments)
    except (OSError, ProtocolError):
        return None
    return found if sealed and sizes == list(found.segments) else None


class StreamedLease(Lease):
    """A `Lease` over TCP. Segments that are mapped before `wait_ready` show bytes as they arrive."""

    def __init__(self, link: Link, manifest: Manifest, dram: Dram, *, whole: bool = False) -> None:
        """Take over `dram`; with `whole` all bytes are in it already."""
        self._channel = self._link = link
        self.manifest = manifest
        self.fetched = not whole
        encoded = manifests.encode(self.manifest)
        self._dram = dram
        self.page = self._dram.page
        self.manifest_fd, self.manifest_bytes = sealed_bytes(encoded, "glowplug:manifest"), len(encoded)
        self.segments = [os.dup(fd) for fd in self._dram.fds]
        self.ready, self.tier, self.revision, self.spans = False, "", "", []
        self.arrived = list(manifest.segments) if whole else [0] * len(self.segments)
        self._lock = threading.Condition()
        self._done = sum(self.arrived)
        self._failure: AgentError | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def wait_ready(self, deadline: float, on_progress: Callable[[int, int], None] | None = None) -> None:
        reported = -1
        while True:
            with self._lock:
                if self._done == reported and not self._ended:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._lock.wait(left):
                        raise AgentTimeout("the weights did not arrive in time; is the agent overloaded or stopped?")
                done, ended, failure = self._done, self._ended, self._failure
            if failure is not None:
                raise failure
            if on_progress is not None and done != reported:
                on_progress(done, self.manifest.nbytes)
            reported = done
            if ended:
                return

    def close(self) -> None:
        self._link.interrupt()
        self._thread.join()
        super().close()
        self._dram.close()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure: AgentError | None = None
        try:
            ready = self._receive()
            self._dram.seal()
            self.tier, self.spans = ready.tier, ready.spans
            self.revision = ready.revision or self.revision
            self.ready = True
        except Disconnected as error:
            failure = LeaseLost(f"the cache agent went away ({error}); it is asked again when it is back")
        except AgentError as error:
            failure = error
        except Exception as error:
            failure = AgentError(f"receiving the weights failed: {error!r}")
        with self._lock:
            self._failure, self._ended = failure, True
            self._lock.notify_all()

    def _receive(self) -> LeaseReady:
        sent = list(self.arrived)
        while True:
            message, _ = self._link.receive(time.monotonic() + _MESSAGE_SECONDS)
            match message:
                case StreamedPiece(segment, offset, size):
                    if segment >= len(sent) or offset != sent[segment]:
                        raise ProtocolError("the agent sent a piece out of turn")
                    if offset + size > self.manifest.segments[segment]:
                        raise ProtocolError("the agent sent more than the segment holds")
                    view = self._dram.segments[segment].view
                    assert view is not None, "sealed only when all is there"
                    with view[offset : offset + size] as place:
                        self._link.read_into(place, _PIECE_SECONDS)
                    sent[segment] += size
                    self.arrived = list(sent)
                    with self._lock:
                        self._done += size
                        self._lock.notify_all()
                case LeaseReady():
                    if sent != list(self.manifest.segments):
                        raise ProtocolError("the agent called the weights complete before all had come")
                    return message
                case ErrorReply(code, text):
                    raise from_wire(code, text)
                case _:
                    continue  # a drain: a process whose lease is not ready yet has nothing to hand over
