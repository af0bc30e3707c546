"""Owns the memory that functions offer after an agent's restart, until it is proved and becomes an entry's.

A function that outlived its agent still maps the model. Its memfds are adopted only when no process can ever change
them (all seals, which the kernel grants only while no writable mapping exists), when no page is missing (touching a
hole could kill the agent), and when their content digest is the revision of the origin's files. The layout is this
agent's own; nothing but the fds comes from the client.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cache_agent import limits
from cache_agent.errors import translated
from cache_agent.ledger import Ledger
from cache_agent.model import content
from cache_agent.model import manifest as manifests
from cache_agent.model.checkpoint import Description, describe
from cache_agent.model.manifest import Manifest
from cache_agent.model.origin import Origin
from cache_agent.model.uri import ModelURI
from cache_agent.residency.background import Background, Lane, lane_of
from cache_agent.residency.events import Event, Offered, OfferFailed
from cache_agent.residency.memory import EntryMemory, Resident, inodes
from cache_agent.residency.revisions import Revisions
from cache_agent.tiers.dram import Dram

log = logging.getLogger("glowplug.agent")

# Offers of one origin's models that are examined at once: functions that wait for the bytes start meanwhile, and need
# the processors, too.
_AT_ONCE = 4
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_BLOCK = 512  # of st_blocks
_STEP = 8 << 20


class NotAdopted(Exception):
    """Offered bytes stay the function's own; the text says why."""


class Spares:
    """Offered memory that no entry has yet, and memory that stays its function's own. Any thread."""

    def __init__(
        self,
        open_origin: Callable[[ModelURI], Origin],
        revisions: Revisions,
        resident: Callable[[list[tuple[int, int]]], Resident | None],
        handle: Callable[[Event], None],
        roots: Sequence[Path] = (),
    ) -> None:
        """`resident(inodes)` finds the entry with this memory; `handle` gets each offer's outcome, in a thread of ours.

        `roots` are the agent's roots of files.
        """
        self._open_origin, self._revisions, self._resident, self._handle = open_origin, revisions, resident, handle
        self._lock = threading.Lock()  # guards what follows; nothing is called under it
        self._proved: dict[int, EntryMemory] = {}  # and not yet an entry's
        self._sizes: dict[int, int] = {}
        self._orphans: dict[int, tuple[str, int]] = {}  # lease -> URI and bytes of memory that is its function's own
        self._roots = roots
        self._background = Background("adoption", of_origin=max(2, min(_AT_ONCE, limits.cpu_quota() // 2)), of_place=1)

    def examine(self, lease: int, uri: ModelURI, source: str, fds: list[int]) -> None:
        """Begin to prove an offer, and take over `fds`. Raises `RuntimeError` after `close`, and leaves `fds` then.

        Offers of the same memory are examined one after the other: the first of equal offers becomes the entry.
        """
        lane = Lane(lane_of(uri, self._roots).origin, str(inodes(fds)))
        self._background.submit(lane, self._examine, lease, uri, source, fds)

    def take(self, lease: int) -> EntryMemory:
        """Give proved memory to the caller."""
        with self._lock:
            return self._proved.pop(lease)

    def orphan(self, lease: int, uri: str) -> None:
        """Note that the offered bytes stay the function's own."""
        with self._lock:
            self._orphans[lease] = uri, self._sizes.pop(lease, 0)

    def forget(self, lease: int) -> None:
        with self._lock:
            self._orphans.pop(lease, None)

    def orphans(self, uri: str = "") -> list[int]:
        """Return the leases whose function maps bytes of its own of this model, or of any."""
        with self._lock:
            return [lease for lease, (model, _) in self._orphans.items() if uri in ("", model)]

    @property
    def orphaned(self) -> int:
        """The bytes that functions map and the agent cannot lend."""
        with self._lock:
            return sum(size for _, size in self._orphans.values())

    def close(self) -> None:
        self._background.close()

    def _examine(self, lease: int, uri: ModelURI, source: str, fds: list[int]) -> None:
        event: Event
        try:
            with self._lock:
                self._sizes[lease] = _sealed_size(fds)
            event = self._prove(lease, uri, source, fds)
        except NotAdopted as error:
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
        memory = _received(origin, source, fds)
        plan = memory.description.manifest
        with self._lock:
            self._proved[lease] = memory
        if (same := self._resident(inodes(fds))) is not None:
            return Offered(lease, uri.text, plan, same.revision, same.entry)
        revision = _proved_revision(memory, origin, self._revisions.of(source))
        self._revisions.remember(source, revision)
        return Offered(lease, uri.text, plan, revision)


# --- the proof --------------------------------------------------------------------------------------------------------


def _sealed_size(fds: Sequence[int]) -> int:
    """Return the bytes behind those fds that are sealed memfds; all others count as 0, whatever their size."""
    return sum(os.fstat(fd).st_blocks * _BLOCK for fd in fds if _is_sealed(fd))


def _check(fds: Sequence[int], plan: Manifest) -> None:
    """Raise `NotAdopted` unless the fds are immutable, whole, and of the plan's sizes."""
    if len(fds) != len(plan.segments):
        raise NotAdopted(f"{len(fds)} segments were offered and the model has {len(plan.segments)}")
    for number, (fd, size) in enumerate(zip(fds, plan.segments, strict=True)):
        if not _is_sealed(fd):
            raise NotAdopted(f"segment {number} is not sealed: somebody could write to it")
        status = os.fstat(fd)
        if status.st_size != size:
            raise NotAdopted(f"segment {number} has {status.st_size} bytes and the model's has {size}")
        if status.st_blocks * _BLOCK < size:
            raise NotAdopted(f"segment {number} has holes")


def _received(origin: Origin, source: str, fds: Sequence[int]) -> EntryMemory:
    """Open the memory behind the fds anew, as the memory of an entry that has yet to be proved.

    Raises `NotAdopted`, or what the origin does.
    """
    description = describe(origin)
    if description.manifest.source != source:
        raise NotAdopted("the origin has other files by now")
    _check(fds, description.manifest)
    return EntryMemory(description, Ledger("agent"), Dram.adopted(fds), tier="dram")


def _proved_revision(memory: EntryMemory, origin: Origin, known: str) -> str:
    """Hash received memory and return its revision; `known` is the source's revision, or "" to read the origin.

    Raises `NotAdopted`, or what the origin does.
    """
    assert memory.dram is not None, "received"
    maps = memory.dram.map()
    try:
        if not content.gaps_are_zero(memory.description.manifest, maps):
            raise NotAdopted("there is something between the tensors")
        found = content.digest(memory.description, maps)
    finally:
        for mapping in maps:
            mapping.close()
    wanted = known or _revision_at(memory.description, origin)
    if found != wanted:
        raise NotAdopted(f"the bytes are {found} and the model is {wanted}")
    memory.keep_manifest()
    return found


def _is_sealed(fd: int) -> bool:
    with contextlib.suppress(OSError):  # no memfd
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    return False


def _revision_at(description: Description, origin: Origin) -> str:
    """Read and hash the origin's files once, without keeping them, for bytes whose revision this node does not know."""
    contents = {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in description.manifest.files.items()
    }
    for weights in description.manifest.weight_files:
        file = description.source.file(weights.name)
        assert file is not None, "a manifest names only files of its source"
        total = hashlib.sha256()
        for start in range(0, file.size, _STEP):
            total.update(origin.read(file, start, min(_STEP, file.size - start)))
        contents[file.name] = (file.size, total.hexdigest())
    return manifests.revision(contents)
