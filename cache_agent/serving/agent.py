"""Owns a node's weights: lets `residency` decide under one lock, and has its decisions carried out outside the lock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count

from cache_agent.cluster.directory import Directory, Holding
from cache_agent.cluster.peers import Peers
from cache_agent.config import AgentConfig
from cache_agent.journal.journal import Journal
from cache_agent.journal.reports import FunctionReports
from cache_agent.model import manifest
from cache_agent.model.checkpoint import describe
from cache_agent.model.origin import Origin
from cache_agent.model.uri import ModelURI, parse_uri
from cache_agent.policy.quota import Account
from cache_agent.residency import events, report
from cache_agent.residency.adoption import Spares
from cache_agent.residency.driver import Driver
from cache_agent.residency.events import Event
from cache_agent.residency.leases import Grants, Holder, PendingRequest, PrefetchHolder
from cache_agent.residency.ledger import ResidencyLedger
from cache_agent.residency.resolving import Resolution, Resolver
from cache_agent.residency.retention import Retention
from cache_agent.residency.revisions import Revisions
from cache_agent.serving.sharing import Sharing
from cache_agent.tiers.origins import Origins
from cache_agent.tiers.ssd import Ssd
from cache_agent.wire.message import TEXT_LIMIT
from cache_agent.wire.messages import Drain
from cache_agent.wire.operations import ClusterReply, EstimateReply, EvictReply, ModelStatus, StatusReply


class Agent:
    """One node's weights. Every method may be called from any thread, and raises any `AgentError`."""

    def __init__(
        self,
        config: AgentConfig,
        directory: Directory,
        open_origin: Callable[[ModelURI], Origin] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.config = config
        self.node = config.node_name
        self._directory = directory
        self._open_origin = open_origin or Origins(config).open
        self._peers = peers
        self.journal = Journal()
        self.reports = FunctionReports(self.journal)
        self._numbers = count(1)
        self._ledger = ledger = ResidencyLedger(config.capacity, config.revalidate)
        ssd = Ssd(config.ssd, config.ssd_size, self._publish_image, self._image_evicted) if config.ssd else None
        self._retention = retention = Retention(ssd, ledger.pinned)
        self._revisions = revisions = Revisions(directory, ssd, self.node, believe=0 if peers else 1)
        self.sharing = Sharing(ledger.memory_of, ledger.lock, retention)
        resolver = Resolver(self._open_origin, revisions, retention, directory, peers, config)
        self._driver = Driver(
            config, ledger, directory, self.journal, retention, revisions, resolver, peers, self._handle
        )
        self._spares = Spares(self._open_origin, revisions, ledger.resident, self._handle, config.file_roots)
        self._grants = Grants(ledger, self._spares, self.journal)

    # --- what connections ask for ---------------------------------------------------------------------------------

    def lease(self, holder: Holder, model: str) -> int:
        """Begin a lease, and return its number; replies come through `holder.deliver`. Raises `BadModelURI`."""
        uri = parse_uri(model)
        account = _account(holder)
        return self._ask(holder, uri.text, lambda lease: events.LeaseAsked(lease, uri.text, uri.revision, account))

    def offer(self, holder: Holder, model: str, source: str, fds: list[int]) -> int:
        """Begin to examine the memory that a function offers, and return the offer's number.

        Takes over `fds`. Replies come through `holder.deliver`. Raises `BadModelURI`.
        """
        try:
            uri = parse_uri(model)
            account = _account(holder)
            number = self._ask(holder, uri.text, lambda lease: events.OfferAsked(lease, uri.text, account))
            self._spares.examine(number, uri, source, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return number

    def release(self, lease: int) -> None:
        """End a lease, or any other request, by its number. Nothing is delivered for it afterwards."""
        self._handle(events.LeaseClosed(lease), forget=lease)

    def evict(self, holder: Holder, model: str, ssd: bool = False) -> int:
        """Begin to evict a model from memory, and with `ssd` from the SSD too, also where only the SSD has it.

        Returns the request's number, 0 where the holder has its reply already.
        """
        uri = parse_uri(model).text
        if ssd and not self._ledger.is_resident(uri) and (removed := self._retention.evict(uri)):
            holder.deliver(EvictReply(0, removed), [])
            return 0
        return self._ask(holder, uri, lambda asker: events.EvictAsked(asker, uri), evict_image=uri if ssd else "")

    def pin(self, holder: Holder, model: str, pinned: bool) -> int:
        """Begin to pin or unpin a model, and return the request's number. Raises `BadModelURI`."""
        uri = parse_uri(model).text
        account = _account(holder)
        return self._ask(holder, uri, lambda asker: events.PinAsked(asker, uri, pinned, account))

    def prefetch(self, model: str) -> None:
        """Begin to load a model, without a lease that outlives the load. Raises `BadModelURI`."""
        uri = parse_uri(model)
        holder = PrefetchHolder(uri.text, self._driver.later, self.release)

        def ask(lease: int) -> Event:
            holder.lease = lease
            return events.LeaseAsked(lease, uri.text, uri.revision)

        self._ask(holder, uri.text, ask)

    def describe(self, model: str) -> manifest.Manifest:
        """Return the manifest of a model from its origin; the weights need not be here. Raises the origin's errors."""
        return describe(self._open_origin(parse_uri(model))).manifest

    def estimate(self, model: str) -> EstimateReply:
        """Estimate a lease on the model now. Reads the origin's headers when nothing here knows the model's size."""
        uri = parse_uri(model).text
        if (known := self._ledger.estimate(uri)) is not None:
            return known
        if (stored := self._retention.find(uri)) is not None:
            return self._ledger.predict("ssd", stored.index.bytes)
        if self._peers is not None and (size := self._peers.size_elsewhere(uri)):
            return self._ledger.predict("peer", size)
        return self._ledger.predict("origin", self.describe(model).nbytes)

    def push_drain(self, reason: str, grace: float, model: str = "", pod: str = "") -> int:
        """Ask the holders of leases on `model`, or those in `pod`, to hand their work over; return their number.

        An empty `model` or `pod` stands for all.
        """
        uri = parse_uri(model).text if model else ""
        with self._ledger.lock:
            leases = [*self._ledger.residency.holders(uri), *self._spares.orphans(uri)]
            holders = [self._grants.holder(lease) for lease in leases]
            holders = [holder for holder in holders if not pod or holder.pod == pod]
            for holder in holders:
                holder.deliver(Drain(reason, grace), [])
        return len(holders)

    def status(self) -> tuple[int, int, list[ModelStatus]]:
        """Return capacity and use in bytes, and the models."""
        return self._ledger.status()

    def answers(self, seconds: float) -> bool:
        """Return whether the agent's lock can be had within so many seconds."""
        return self._ledger.answers(seconds)

    def full_status(self) -> StatusReply:
        """Return everything that the node holds and knows, for administrators."""
        ssd, orphaned, handoffs = self._retention.status(), self._spares.orphaned, self.journal.handoffs()
        tiers, layers = self._ledger.tiers(), self.reports.layers.status()
        return StatusReply(self.node, os.getpid(), *self.status(), ssd, tiers, orphaned, handoffs, layers)

    def cluster(self) -> ClusterReply:
        """Return the nodes and holdings in this node's directory."""
        return report.cluster(self._directory)

    def close(self, deadline: float) -> None:
        """Stop loads and give all memory back; functions keep the segments that they map."""
        self._spares.close()
        self._driver.close(deadline)
        self._retention.close()

    # --- events of the SSD tier ---------------------------------------------------------------------------------------

    def _image_evicted(self, uri: str, size: int, why: str) -> None:
        self.journal.evicted(uri, "ssd", size, why)

    def _publish_image(self, source: str, size: int) -> None:
        if size:
            self._directory.publish(source, Holding(self.node, "ssd", size, size))
        else:
            self._directory.withdraw(source, self.node, "ssd")

    # --- deciding under the lock, acting outside ------------------------------------------------------------------

    def _ask(self, holder: Holder, model: str, event: Callable[[int], Event], *, evict_image: str = "") -> int:
        number = next(self._numbers)
        with self._ledger.lock:
            self._grants.expect(number, PendingRequest(holder, model, evict_image=evict_image))
        self._handle(event(number))
        return number

    def _handle(self, event: Event, *, forget: int = 0, resolved: Resolution | None = None) -> None:
        with self._ledger.lock:
            actions = self._ledger.residency.handle(event, time.monotonic())
            work = [action for action in actions if not self._grants.give(action)]
            self._grants.forget(forget)
            self._spares.forget(forget)
        for action in work:
            if isinstance(action, events.EvictDone):
                self._evict_image(action)
            else:
                self._driver.act(action, resolved)

    def _evict_image(self, done: events.EvictDone) -> None:
        """Remove the image of a model whose memory has been given back, and reply."""
        with self._ledger.lock:
            asked = self._grants.take(done.asker)
        removed = self._retention.evict(asked.evict_image)
        asked.holder.deliver(EvictReply(done.bytes, removed, done.stays[:TEXT_LIMIT]), [])


def _account(holder: Holder) -> Account:
    return Account(holder.caller.account, holder.permission.dram)
