"""Owns the requests under way, and turns what residency decides about them into messages to those who asked.

All of it under the books' lock, so that messages are queued in the order of the decisions; queueing never blocks.
"""

from __future__ import annotations

import os
import time

from cache_agent.errors import InternalError, NoCapacity
from cache_agent.journal.journal import Journal
from cache_agent.ledger import Span
from cache_agent.model.uri import parse_uri
from cache_agent.policy.rights import Permission
from cache_agent.residency import events
from cache_agent.residency.events import Action
from cache_agent.residency.leases import Holder, PendingRequest
from cache_agent.residency.ledger import ResidencyLedger
from cache_agent.residency.spares import Spares
from cache_agent.wire.message import TEXT_LIMIT
from cache_agent.wire.messages import Adopted, ErrorReply, Granted, LeaseReady, RevisionNotice
from cache_agent.wire.operations import EvictReply, PinReply


class Grants:
    """For who holds the books' lock."""

    def __init__(self, books: ResidencyLedger, offers: Spares, journal: Journal) -> None:
        self._books, self._offers, self._journal = books, offers, journal
        self._asked: dict[int, PendingRequest] = {}

    def expect(self, number: int, asked: PendingRequest) -> None:
        """A request begins."""
        self._asked[number] = asked

    def forget(self, number: int) -> None:
        """Nothing is said to this one any more."""
        self._asked.pop(number, None)

    def holder(self, number: int) -> Holder:
        return self._asked[number].holder

    def take(self, number: int) -> PendingRequest:
        """A request that is answered by whoever takes it."""
        return self._asked.pop(number)

    def give(self, action: Action) -> bool:
        """Queues the message that an action stands for; False when there is work to do, too."""
        match action:
            case events.Grant(lease, entry):
                self._grant(lease, entry)
            case events.Complete(lease, entry, resident, revision):
                asked = self._asked[lease]
                held = self._books.held[entry]
                spans = [Span("agent", "lease", asked.start, time.monotonic_ns())]
                spans += [] if resident else held.ledger.spans()
                tier = "dram" if resident else held.tier
                asked.holder.deliver(LeaseReady(tier, revision, spans), [])
                self._journal.leased(asked.model, tier)
            case events.Adopt(lease, entry, fresh):
                offered = self._offers.take(lease)
                if fresh:
                    self._books.held[entry] = offered
                else:
                    offered.close()
                asked, revision = self._asked[lease], self._books.residency.entries[entry].revision
                asked.holder.deliver(Adopted(revision, True), [])
                self._journal.record("adopted", asked.model, f"adopted {asked.model} from a function: {revision}")
                return not fresh  # what is new here is yet to be kept
            case events.Orphan(lease, uri, why):
                self._offers.orphan(lease, uri)
                self._journal.record("orphaned", uri, f"{uri} stays a function's own: {why}")
                self._asked[lease].holder.deliver(Adopted("", False, why[:TEXT_LIMIT]), [])
            case events.Announce(lease, revision):
                self._asked[lease].holder.deliver(RevisionNotice(revision), [])
            case events.Refuse(lease, error):
                asked = self._asked.pop(lease)
                text = error.text
                if isinstance(error, NoCapacity) and not (grant := asked.holder.grant).admin:
                    text = error.told(lambda uri: _may_have(grant, uri))
                asked.holder.deliver(ErrorReply(error.code, text[:TEXT_LIMIT]), [])
                self._journal.refused(asked.model, error.code, error.text)
            case events.EvictDone(asker, size, stays):
                if self._asked[asker].evict_image:
                    return False  # there are files to remove first
                self._asked.pop(asker).holder.deliver(EvictReply(size, stays=stays[:TEXT_LIMIT]), [])
            case events.PinDone(asker, size):
                asked = self._asked.pop(asker)
                asked.holder.deliver(PinReply(size), [])
                kind = "pinned" if asked.model in self._books.residency.pins else "unpinned"
                self._journal.record(kind, asked.model, f"{kind} {asked.model} ({size // 10**6} MB)")
            case _:
                return False
        return True

    def _grant(self, lease: int, entry: int) -> None:
        held, holder = self._books.held[entry], self._asked[lease].holder
        assert held.dram is not None, "granted only after it was reserved"
        try:
            fds = _duplicates(held.manifest_fd, *held.dram.fds)
        except OSError as error:  # this client's connection ends, and its lease with it; the others go on
            text = f"the agent cannot hand out the weights: {error.strerror}. Raise its limit of open files"
            holder.deliver(ErrorReply(InternalError.code, text), [])
            return
        sizes = [segment.size for segment in held.dram.segments]
        source = held.description.source.id
        holder.deliver(Granted(source, held.manifest_bytes, sizes, held.dram.page, len(fds)), fds, held.load)


def _may_have(grant: Permission, model: str) -> bool:
    uri = parse_uri(model)  # it was one before
    return grant.covers(uri.scheme, uri.place)


def _duplicates(*fds: int) -> list[int]:
    copies: list[int] = []
    try:
        copies.extend(os.dup(fd) for fd in fds)
    except OSError:
        for copy in copies:
            os.close(copy)
        raise
    return copies
