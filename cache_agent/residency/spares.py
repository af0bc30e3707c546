"""Owns what functions offer after an agent's restart until it is an entry's, and remembers what stays their own.

Whether bytes are what they are said to be is `adoption`'s to prove: a few offers at a time, because the functions that
waited for the bytes are starting while these are hashed, and of the same memory one after the other, because of two
equal offers the first is it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cache_agent import limits
from cache_agent.errors import translated
from cache_agent.model.origin import Origin
from cache_agent.model.uri import ModelURI
from cache_agent.residency import adoption
from cache_agent.residency.background import Background, Lane, lane_of
from cache_agent.residency.events import Event, Offered, OfferFailed
from cache_agent.residency.leases import EntryMemory, Resident
from cache_agent.residency.revisions import Revisions

log = logging.getLogger("glowplug.agent")

_AT_ONCE = 4  # of one origin's models


class Spares:
    """Every method may be called from any thread."""

    def __init__(
        self,
        open_origin: Callable[[ModelURI], Origin],
        revisions: Revisions,
        resident: Callable[[list[tuple[int, int]]], Resident | None],
        handle: Callable[[Event], None],
        roots: Sequence[Path] = (),
    ) -> None:
        """`resident(inodes)` is the entry whose memory it is; `handle` gets what came of an offer, in our thread.

        `roots` are the agent's roots of files.
        """
        self._open_origin, self._revisions, self._resident, self._handle = open_origin, revisions, resident, handle
        self._lock = threading.Lock()  # guards what follows; nothing is called under it
        self._proved: dict[int, EntryMemory] = {}  # and not yet an entry's
        self._sizes: dict[int, int] = {}
        self._orphans: dict[int, tuple[str, int]] = {}  # lease -> what its function maps and nobody else can have
        self._roots = roots
        self._jobs = Background("adoption", of_origin=max(2, min(_AT_ONCE, limits.cpu_quota() // 2)), of_place=1)

    def examine(self, lease: int, uri: ModelURI, source: str, fds: list[int]) -> None:
        """Begins, and takes over `fds`. Raises `RuntimeError` after `close`, and leaves them then."""
        lane = Lane(lane_of(uri, self._roots).origin, str(adoption.inodes(fds)))
        self._jobs.submit(lane, self._examine, lease, uri, source, fds)

    def take(self, lease: int) -> EntryMemory:
        """What was proved is the caller's from now on."""
        with self._lock:
            return self._proved.pop(lease)

    def orphan(self, lease: int, uri: str) -> None:
        """The bytes stay the function's own."""
        with self._lock:
            self._orphans[lease] = uri, self._sizes.pop(lease, 0)

    def forget(self, lease: int) -> None:
        with self._lock:
            self._orphans.pop(lease, None)

    def orphans(self, uri: str = "") -> list[int]:
        """Leases whose function maps bytes of its own of this model, or of any."""
        with self._lock:
            return [lease for lease, (model, _) in self._orphans.items() if uri in ("", model)]

    @property
    def orphaned(self) -> int:
        """Bytes that functions map and nobody else can have."""
        with self._lock:
            return sum(size for _, size in self._orphans.values())

    def close(self) -> None:
        self._jobs.close()

    def _examine(self, lease: int, uri: ModelURI, source: str, fds: list[int]) -> None:
        event: Event
        try:
            with self._lock:
                self._sizes[lease] = adoption.sealed_size(fds)
            event = self._prove(lease, uri, source, fds)
        except adoption.NotAdopted as error:
            event = OfferFailed(lease, uri.text, str(error))
        except Exception as error:
            event = OfferFailed(lease, uri.text, translated(error, uri.text).text)
        finally:
            for fd in fds:
                os.close(fd)
        log.info("offer of %s: %s", uri.text, event.why if isinstance(event, OfferFailed) else "proved")
        try:
            self._handle(event)
        except Exception:  # a fault of ours must not vanish in a future that nobody reads
            log.exception("an offer of %s failed", uri.text)
        finally:
            with self._lock:
                self._sizes.pop(lease, None)
                left = self._proved.pop(lease, None)
            if left is not None:
                left.close()

    def _prove(self, lease: int, uri: ModelURI, source: str, fds: list[int]) -> Event:
        origin = self._open_origin(uri)
        memory = adoption.receive(origin, source, fds)
        plan = memory.description.manifest
        with self._lock:
            self._proved[lease] = memory
        if (same := self._resident(adoption.inodes(fds))) is not None:
            return Offered(lease, uri.text, plan, same.revision, same.entry)
        revision = adoption.prove(memory, origin, self._revisions.of(source))
        self._revisions.remember(source, revision)
        return Offered(lease, uri.text, plan, revision)
