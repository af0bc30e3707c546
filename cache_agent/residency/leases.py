"""Owns the requests under way (leases, evictions, pins, offers) and turns residency's actions into their answers.

Answers are queued under the ledger's lock, so in the order of the decisions; queueing never blocks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cache_agent.errors import InternalError, NoCapacity
from cache_agent.journal.journal import Journal
from cache_agent.ledger import Span
from cache_agent.loading.loader import ModelLoad
from cache_agent.model.uri import parse_uri
from cache_agent.policy.rights import EVERYTHING, NOBODY, Caller, Permission
from cache_agent.residency import events
from cache_agent.residency.adoption import Spares
from cache_agent.residency.events import Action
from cache_agent.residency.ledger import ResidencyLedger
from cache_agent.wire.message import TEXT_LIMIT, Message
from cache_agent.wire.messages import Adopted, ErrorReply, Granted, LeaseReady, RevisionNotice
from cache_agent.wire.operations import EvictReply, PinReply

log = logging.getLogger("glowplug.agent")


class Holder(Protocol):
    """The party that a request belongs to: a connection, or a prefetch."""

    @property
    def pod(self) -> str:
        """The UID of the pod that the holder runs in, or ""."""
        ...

    @property
    def caller(self) -> Caller: ...

    @property
    def permission(self) -> Permission:
        """The rights of the caller now."""
        ...

    def deliver(self, message: Message, fds: list[int], load: ModelLoad | None = None) -> None:
        """Take an answer, without blocking; the holder closes the fds."""
        ...


@dataclass(slots=True)
class PendingRequest:
    """A request under way, about the URI `model`; the images of `evict_image` go once its memory is given back."""

    holder: Holder
    model: str = ""
    start: int = field(default_factory=time.monotonic_ns)
    evict_image: str = ""


class PrefetchHolder:
    """A holder that waits until a model is loaded and then releases the lease."""

    pod = ""
    caller = NOBODY
    permission = EVERYTHING

    def __init__(self, uri: str, later: Callable[[Callable[[], None]], None], release: Callable[[int], None]) -> None:
        """`later(work)` runs the work once the ledger's lock is free."""
        self.lease = 0
        self._uri, self._later, self._release = uri, later, release

    def deliver(self, message: Message, fds: list[int], _load: ModelLoad | None = None) -> None:
        for fd in fds:
            os.close(fd)
        if isinstance(message, ErrorReply):
            log.warning("prefetching %s failed: %s", self._uri, message.text)
        if isinstance(message, LeaseReady):
            log.info("prefetched %s from %s", self._uri, message.tier)
        if isinstance(message, (LeaseReady, ErrorReply)):
            self._later(lambda: self._release(self.lease))


class Grants:
    """The requests under way, by number. Every method is called under the ledger's lock."""

    def __init__(self, ledger: ResidencyLedger, spares: Spares, journal: Journal) -> None:
        self._ledger, self._spares, self._journal = ledger, spares, journal
        self._asked: dict[int, PendingRequest] = {}

    def expect(self, number: int, asked: PendingRequest) -> None:
        """Begin a request."""
        self._asked[number] = asked

    def forget(self, number: int) -> None:
        """End a request without an answer."""
        self._asked.pop(number, None)

    def holder(self, number: int) -> Holder:
        return self._asked[number].holder

    def take(self, number: int) -> PendingRequest:
        """End a request that the caller answers itself."""
        return self._asked.pop(number)

    def give(self, action: Action) -> bool:
        """Queue the answer that an action stands for; False when the action also takes work outside the lock."""
        match action:
            case events.Grant(lease, entry):
                self._grant(lease, entry)
            case events.Complete(lease, entry, resident, revision):
                asked = self._asked[lease]
                memory = self._ledger.memories[entry]
                spans = [Span("agent", "lease", asked.start, time.monotonic_ns())]
                spans += [] if resident else memory.phases.spans()
                tier = "dram" if resident else memory.tier
                asked.holder.deliver(LeaseReady(tier, revision, spans), [])
                self._journal.leased(asked.model, tier)
            case events.Adopt(lease, entry, fresh):
                offered = self._spares.take(lease)
                if fresh:
                    self._ledger.memories[entry] = offered
                else:
                    offered.close()
                asked, revision = self._asked[lease], self._ledger.residency.entries[entry].revision
                asked.holder.deliver(Adopted(revision, True), [])
                self._journal.record("adopted", asked.model, f"adopted {asked.model} from a function: {revision}")
                return not fresh  # the driver publishes a new entry, and writes it to SSD
            case events.Orphan(lease, uri, why):
                self._spares.orphan(lease, uri)
                self._journal.record("orphaned", uri, f"{uri} stays a function's own: {why}")
                self._asked[lease].holder.deliver(Adopted("", False, why[:TEXT_LIMIT]), [])
            case events.Announce(lease, revision):
                self._asked[lease].holder.deliver(RevisionNotice(revision), [])
            case events.Refuse(lease, error):
                asked = self._asked.pop(lease)
                text = error.text
                if isinstance(error, NoCapacity) and not (permission := asked.holder.permission).admin:
                    text = error.text_for(lambda uri: _may_have(permission, uri))
                asked.holder.deliver(ErrorReply(error.code, text[:TEXT_LIMIT]), [])
                self._journal.refused(asked.model, error.code, error.text)
            case events.EvictDone(asker, size, stays):
                if self._asked[asker].evict_image:
                    return False  # the image on SSD is removed before the answer
                self._asked.pop(asker).holder.deliver(EvictReply(size, stays=stays[:TEXT_LIMIT]), [])
            case events.PinDone(asker, size):
                asked = self._asked.pop(asker)
                asked.holder.deliver(PinReply(size), [])
                kind = "pinned" if asked.model in self._ledger.residency.pins else "unpinned"
                self._journal.record(kind, asked.model, f"{kind} {asked.model} ({size // 10**6} MB)")
            case _:
                return False
        return True

    def _grant(self, lease: int, entry: int) -> None:
        memory, holder = self._ledger.memories[entry], self._asked[lease].holder
        assert memory.dram is not None, "granted only after it was reserved"
        try:
            fds = _duplicates(memory.manifest_fd, *memory.dram.fds)
        except OSError as error:  # this client's connection ends, and its lease with it; the others go on
            text = f"the agent cannot hand out the weights: {error.strerror}. Raise its limit of open files"
            holder.deliver(ErrorReply(InternalError.code, text), [])
            return
        sizes = [segment.size for segment in memory.dram.segments]
        source = memory.description.source.id
        holder.deliver(Granted(source, memory.manifest_bytes, sizes, memory.dram.page, len(fds)), fds, memory.load)


def _may_have(permission: Permission, model: str) -> bool:
    uri = parse_uri(model)  # an entry's URI, so a valid one
    return permission.covers(uri.scheme, uri.place)


def _duplicates(*fds: int) -> list[int]:
    copies: list[int] = []
    try:
        copies.extend(os.dup(fd) for fd in fds)
    except OSError:
        for copy in copies:
            os.close(copy)
        raise
    return copies
