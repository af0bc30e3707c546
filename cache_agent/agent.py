"""Owns a node's weights: asks `residency` what to do under one lock, does it outside, reports back what came of it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from cache_agent import manifest
from cache_agent.cluster.directory import Directory, Holding
from cache_agent.cluster.peers import Peers
from cache_agent.cluster.sharing import Sharing
from cache_agent.config import AgentConfig
from cache_agent.errors import InternalError, NoCapacity, OriginChanged, translated
from cache_agent.ledger import Span
from cache_agent.loading import content
from cache_agent.loading.checkpoint import describe
from cache_agent.loading.loader import Load
from cache_agent.loading.origins import Origins
from cache_agent.loading.resolving import Resolver
from cache_agent.loading.revisions import Revisions
from cache_agent.policy.estimate import Estimator, shared
from cache_agent.policy.quota import Account
from cache_agent.policy.rights import Grant
from cache_agent.residency import adoption, events, report
from cache_agent.residency import machine as residency
from cache_agent.residency.events import Action, Event
from cache_agent.residency.held import Asked, Errand, Held, Holder, Resolution
from cache_agent.residency.keeping import Keeping
from cache_agent.residency.offers import Offers, Resident
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.origin import ModelURI, Origin, parse_uri
from cache_agent.tiers.ssd import Ssd
from cache_agent.web.journal import Journal
from cache_agent.web.starts import Starts
from cache_agent.wire.message import TEXT_LIMIT
from cache_agent.wire.messages import (
    Admitted,
    Adopted,
    ClusterReply,
    Drain,
    ErrorReply,
    EstimateReply,
    EvictReply,
    Granted,
    ModelStatus,
    PinReply,
    Ready,
    Started,
    StatusReply,
)

log = logging.getLogger("glowplug.agent")

_JOBS = 16


class Agent:
    """One node's weights. Every method may be called from any thread."""

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
        ssd = Ssd(config.ssd, config.ssd_size, self._tell_image, self._image_evicted) if config.ssd else None
        self.starts = Starts()
        self._keeping = Keeping(ssd, self._pinned)
        self._revisions = Revisions(directory, ssd, self.node, believe=0 if peers else 1)
        self._residency = residency.Residency(config.capacity, config.revalidate)
        self._lock = threading.RLock()  # guards everything below, and residency
        self._estimator = Estimator()
        self._asked: dict[int, Asked] = {}
        self._held: dict[int, Held] = {}
        self._closing = False
        self._numbers = count(1)
        self._jobs = ThreadPoolExecutor(_JOBS, thread_name_prefix="job")
        self._admissions = ThreadPoolExecutor(1, thread_name_prefix="admission")
        self.sharing = Sharing(self._held_of, self._lock, self._keeping)
        self._resolver = Resolver(self._open_origin, self._revisions, self._keeping, directory, peers, config)
        self._offers = Offers(self._open_origin, self._revisions, self._resident, self._handle)

    # --- what connections ask for ---------------------------------------------------------------------------------

    def lease(self, holder: Holder, model: str) -> int:
        """Begins a lease; what follows comes through `holder.deliver`. Raises `BadModelURI`."""
        uri = parse_uri(model)
        account = _account(holder)
        return self._ask(holder, uri.text, lambda lease: events.LeaseAsked(lease, uri.text, uri.revision, account))

    def offer(self, holder: Holder, model: str, source: str, fds: list[int]) -> int:
        """Begins to examine what a function offers, and takes over `fds`. Raises `BadModelURI`."""
        try:
            uri = parse_uri(model)
            account = _account(holder)
            number = self._ask(holder, uri.text, lambda lease: events.OfferAsked(lease, uri.text, account))
            self._offers.examine(number, uri, source, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return number

    def release(self, lease: int) -> None:
        """Ends a lease, or any other request of its holder. Nothing is delivered for it afterwards."""
        self._handle(events.LeaseClosed(lease), forget=lease)

    def evict(self, holder: Holder, model: str, ssd: bool = False) -> int:
        """From memory, and with `ssd` from there, where it may be alone."""
        uri = parse_uri(model).text
        if ssd:
            with self._lock:
                resident = self._residency.entry_of(uri) is not None
            if not resident and (removed := self._keeping.evict(uri)):
                holder.deliver(EvictReply(0, removed), [])
                return 0
        return self._ask(holder, uri, lambda asker: events.EvictAsked(asker, uri), evict_image=uri if ssd else "")

    def pin(self, holder: Holder, model: str, pinned: bool) -> int:
        uri = parse_uri(model).text
        account = _account(holder)
        return self._ask(holder, uri, lambda asker: events.PinAsked(asker, uri, pinned, account))

    def prefetch(self, model: str) -> None:
        """Begins to bring a model in; nobody holds it afterwards. Raises `BadModelURI`."""
        uri = parse_uri(model)
        errand = Errand(uri.text, self._jobs, self.release)

        def ask(lease: int) -> Event:
            errand.lease = lease
            return events.LeaseAsked(lease, uri.text, uri.revision)

        self._ask(errand, uri.text, ask)

    def describe(self, model: str) -> manifest.Manifest:
        """The manifest of a model whose weights need not be here. Raises what the origin does."""
        return describe(self._open_origin(parse_uri(model))).manifest

    def estimate(self, model: str) -> EstimateReply:
        """What a lease would take now. Reads the origin's headers when nothing here knows the model's size."""
        uri = parse_uri(model).text
        with self._lock:
            entry = self._residency.entry_of(uri)
            held = self._held.get(entry.number) if entry else None
            if entry is not None and (entry.state == "ready" or held is None):
                return EstimateReply(0.0, "dram", 1.0, entry.bytes)
            if entry is not None and held is not None:
                return EstimateReply(
                    *self._estimator.predict(held.tier, self._work(held.tier, held.rest())), entry.bytes
                )
        stored = self._keeping.find(uri)
        if stored is not None:
            tier, size = "ssd", stored.index.bytes
        elif self._peers is not None and (size := self._peers.size_elsewhere(uri)):
            tier = "peer"
        else:
            tier, size = "origin", self.describe(model).nbytes
        with self._lock:
            return EstimateReply(*self._estimator.predict(tier, self._work(tier, size)), size)

    def _work(self, tier: str, size: int, itself: Held | None = None) -> int:
        """Bytes that pass on the tier until `size` of a load are through; under the lock."""
        return shared(size, (held.rest() for held in self._held.values() if held.tier == tier and held is not itself))

    def push_drain(self, reason: str, grace: float, model: str = "", pod: str = "") -> int:
        """Tells the holders of leases on `model`, or those in `pod`, to hand their work over; how many there are.

        Empty means all of them.
        """
        uri = parse_uri(model).text if model else ""
        with self._lock:
            leases = [*self._residency.holders(uri), *self._offers.orphans(uri)]
            holders = [self._asked[lease].holder for lease in leases]
            holders = [holder for holder in holders if not pod or holder.pod == pod]
            for holder in holders:
                holder.deliver(Drain(reason, grace), [])
        return len(holders)

    def status(self) -> tuple[int, int, list[ModelStatus]]:
        """(capacity, used, models); bytes."""
        now = time.monotonic()
        with self._lock:
            books = self._residency
            models = [
                report.model(entry, self._held.get(entry.number), books.is_pinned(entry), now)
                for entry in books.entries.values()
            ]
            return books.capacity, books.used, models

    def answers(self, seconds: float) -> bool:
        """Whether the agent can decide anything within so many seconds."""
        if not self._lock.acquire(timeout=seconds):
            return False
        self._lock.release()
        return True

    def full_status(self) -> StatusReply:
        with self._lock:
            tiers = report.tiers(self._estimator.tiers)
        ssd, orphaned, handoffs = self._keeping.status(), self._offers.orphaned, self.journal.handoffs()
        return StatusReply(self.node, os.getpid(), *self.status(), ssd, tiers, orphaned, handoffs)

    def started(self, told: Started) -> None:
        """A function of this node tells how its start went."""
        start, new = self.starts.add(told)
        if not new:
            return
        edges = [edge for span in start.spans for edge in (span.start, span.end)]
        seconds = (max(edges) - min(edges)) / 1e9 if edges else 0.0
        how = f"could not start: {start.error}" if start.error else f"started ({start.kind}) in {seconds:.2f} s"
        self.journal.record("started", start.model, f"{start.function} {how}")

    def cluster(self) -> ClusterReply:
        """What this node's directory knows of all nodes."""
        return report.cluster(self._directory)

    def close(self, deadline: float) -> None:
        """Stops loads and gives all memory back; mapped segments live on in the functions that map them."""
        with self._lock:
            self._closing = True
            loads = [held.load for held in self._held.values() if held.load is not None]
        for load in loads:
            load.stop()
        self._jobs.shutdown(wait=False, cancel_futures=True)
        self._offers.close()
        self._admissions.shutdown(wait=False, cancel_futures=True)
        for load in loads:
            load.finished.wait(max(0.0, deadline - time.monotonic()))
        with self._lock:
            helds = list(self._held.values())
        for held in helds:
            held.end_tee(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for held in helds:
                if held.load is None or held.load.finished.is_set():
                    held.close()
        self._keeping.close()

    # --- deciding under the lock, acting outside ------------------------------------------------------------------

    def _ask(self, holder: Holder, model: str, event: Callable[[int], Event], *, evict_image: str = "") -> int:
        number = next(self._numbers)
        with self._lock:
            self._asked[number] = Asked(holder, model, evict_image=evict_image)
        self._handle(event(number))
        return number

    def _handle(self, event: Event, *, forget: int = 0, resolved: Resolution | None = None) -> None:
        with self._lock:
            actions = self._residency.handle(event, time.monotonic())
            # Replies are queued here, in the order of the decisions; queueing never blocks.
            work = [action for action in actions if not self._reply(action)]
            self._asked.pop(forget, None)
            self._offers.forget(forget)
        for action in work:
            self._act(action, resolved)

    def _reply(self, action: Action) -> bool:
        """Queues the message that an action stands for; False when it stands for work."""
        match action:
            case events.Grant(lease, entry):
                held = self._held[entry]
                assert held.dram is not None, "granted only after it was reserved"
                try:
                    fds = _duplicates(held.manifest_fd, *held.dram.fds)
                except OSError as error:  # this client's connection ends, and its lease with it; the others go on
                    text = f"the agent cannot hand out the weights: {error.strerror}. Raise its limit of open files"
                    self._asked[lease].holder.deliver(ErrorReply(InternalError.code, text), [])
                    return True
                sizes = [segment.size for segment in held.dram.segments]
                source = held.description.source.id
                message = Granted(source, held.manifest_bytes, sizes, held.dram.page, len(fds))
                self._asked[lease].holder.deliver(message, fds, held.load)
            case events.Complete(lease, entry, resident, revision):
                asked = self._asked[lease]
                spans = [Span("agent", "lease", asked.start, time.monotonic_ns())]
                if not resident:
                    spans += self._held[entry].ledger.spans()
                tier = "dram" if resident else self._held[entry].tier
                asked.holder.deliver(Ready(tier, revision, spans), [])
                self.journal.leased(asked.model, tier)
            case events.Adopt(lease, entry, fresh):
                offered = self._offers.take(lease)
                if fresh:
                    self._held[entry] = offered
                else:
                    offered.close()
                asked, revision = self._asked[lease], self._residency.entries[entry].revision
                asked.holder.deliver(Adopted(revision, True), [])
                self.journal.record("adopted", asked.model, f"adopted {asked.model} from a function: {revision}")
            case events.Orphan(lease, uri, why):
                self._offers.orphan(lease, uri)
                self.journal.record("orphaned", uri, f"{uri} stays a function's own: {why}")
                self._asked[lease].holder.deliver(Adopted("", False, why[:TEXT_LIMIT]), [])
            case events.Announce(lease, revision):
                self._asked[lease].holder.deliver(Admitted(revision), [])
            case events.Refuse(lease, error):
                asked = self._asked.pop(lease)
                text = error.text
                if isinstance(error, NoCapacity) and not (grant := asked.holder.grant).admin:
                    text = error.told(lambda uri: _may_have(grant, uri))
                asked.holder.deliver(ErrorReply(error.code, text[:TEXT_LIMIT]), [])
                self.journal.refused(asked.model, error.code, error.text)
            case events.EvictDone(asker, size, stays):
                if self._asked[asker].evict_image:
                    return False  # there are files to remove first
                self._asked.pop(asker).holder.deliver(EvictReply(size, stays=stays[:TEXT_LIMIT]), [])
            case events.PinDone(asker, size):
                asked = self._asked.pop(asker)
                asked.holder.deliver(PinReply(size), [])
                kind = "pinned" if asked.model in self._residency.pins else "unpinned"
                self.journal.record(kind, asked.model, f"{kind} {asked.model} ({size // 10**6} MB)")
            case _:
                return False
        return True

    def _act(self, action: Action, resolved: Resolution | None) -> None:
        with contextlib.suppress(RuntimeError):  # the pools are shut down: so are all who would hear of the result
            match action:
                case events.Resolve(uri):
                    self._jobs.submit(_logged, self._resolve, uri)
                case events.Load(entry):
                    assert resolved is not None, "a load follows from a resolution"
                    self._jobs.submit(_logged, self._load, entry, resolved)
                case events.Admit(entry):
                    self._admissions.submit(_logged, self._admit, entry)
                case events.Evict(entry, why):
                    self._evict(entry, why)
                case events.EvictDone(asker, size, stays):
                    self._evict_image(asker, size, stays)

    # --- work -----------------------------------------------------------------------------------------------------

    def _resolve(self, uri: str) -> None:
        try:
            found = self._resolver.resolve(uri)
        except Exception as error:
            self._handle(events.ResolveFailed(uri, translated(error, uri)))
            return
        self._handle(events.Resolved(uri, found.description.manifest, found.revision), resolved=found)

    def _load(self, entry: int, resolution: Resolution) -> None:
        description, origin, ledger, known, answers = resolution
        if self._peers is not None and not known:  # what others found it to be is proved before anything is ready
            known = self._revisions.stated(description.source.id, self.config.peer_witnesses)
        plan = description.manifest
        held = Held(description, ledger)
        start = time.monotonic()
        image = None
        try:
            with ledger.span("reserve"):
                held.dram = Dram(plan.segments, huge_pages=self.config.huge_pages, name=f"glowplug:{entry}")
                held.keep_manifest()
            image = self._keeping.open(plan)
            held.load = load = Load(
                description,
                origin,
                held.dram,
                readers=self.config.readers,
                image=image,
                speaks=self._peers is not None,
                known=known,
            )
            if image is not None:
                held.tier = "ssd"
            else:
                load.tee = self._keeping.follow(held.dram, description, origin.uri, resolution.revision)
            with self._lock:
                held.work = self._work(held.tier, plan.nbytes)
                expected = self._estimator.predict(held.tier, held.work)
                self._held[entry] = held
                if self._closing:
                    load.stop()
            self._handle(events.Reserved(entry))
            self._directory.publish(plan.source, self._holding(load))
            if self._peers is not None:  # others may ask us about it from here on
                load.helper = self._peers.helper(load, plan.source, origin_answers=answers)
            load.observer = lambda: self._directory.publish(plan.source, self._holding(load))
            began = time.monotonic()
            with ledger.span("transfer"):
                load.run()
            if len(load.given) * 2 > plan.chunk_count:
                held.tier = "peer"
            self._directory.measured(self.node, held.tier, plan.nbytes / max(time.monotonic() - began, 1e-9))
        except Exception as error:
            self.journal.failed(origin.uri, held.tier, str(error))
            self._directory.withdraw(plan.source, self.node, "dram")
            if held.load and held.load.damaged and isinstance(error, OriginChanged):
                self._keeping.discard(plan.source)
            held.end_tee()
            with self._lock:  # whoever hears of it and asks again finds the memory free; nothing is granted in between
                self._held.pop(entry, None)
                held.close()
                self._handle(events.LoadFailed(entry, translated(error, origin.uri)))
            return
        finally:
            if image is not None:
                image.close()
        seconds = time.monotonic() - start
        guess = expected.confidence == 0
        self.journal.loaded(
            origin.uri, held.tier, plan.nbytes, seconds, expected.seconds, guess=guess, page=held.dram.page
        )
        with self._lock:
            self._estimator.learn(held.tier, held.work, expected, seconds)
        self._directory.publish(plan.source, self._holding(load))
        self._handle(events.Loaded(entry, seconds))
        if load.tee is not None:
            load.tee.complete(load.checksums, seconds)
        elif load.damaged:
            with self._lock:
                maps = held.dram.map() if held.dram is not None else []
            if maps:
                self._keeping.repair(load, maps)

    def _image_evicted(self, uri: str, size: int, why: str) -> None:
        self.journal.evicted(uri, "ssd", size, why)

    def _pinned(self) -> set[str]:
        with self._lock:
            return self._residency.pinned

    def _resident(self, inodes: list[tuple[int, int]]) -> Resident | None:
        """The entry whose memory this is."""
        with self._lock:
            for number, held in self._held.items():
                if held.dram is not None and adoption.inodes(held.dram.fds) == inodes:
                    return Resident(number, self._residency.entries[number].revision)
        return None

    def _holding(self, load: Load) -> Holding:
        return Holding(self.node, "dram", load.progress()[1], load.total)

    def _admit(self, entry: int) -> None:
        with self._lock:
            held = self._held.get(entry)
            if held is None or held.dram is None:
                return
            maps = held.dram.map()
        try:
            proved = held.load.proved if held.load is not None else ""
            revision = proved or content.digest(held.description, maps)
        finally:
            for mapping in maps:
                mapping.close()
        if held.load is None or held.load.tee is None:  # otherwise the tee does it at its end
            with self._lock:
                if held.dram is not None:
                    held.dram.seal()
        self._revisions.remember(held.description.source.id, revision)
        self._handle(events.Admitted(entry, revision))

    def _held_of(self, source: str) -> Held | None:
        """The copy in memory, or on its way there."""
        with self._lock:
            entry = self._residency.entry_with(source)
            return self._held.get(entry.number) if entry is not None else None

    def _tell_image(self, source: str, size: int) -> None:
        if size:
            self._directory.publish(source, Holding(self.node, "ssd", size, size))
        else:
            self._directory.withdraw(source, self.node, "ssd")

    def _evict(self, entry: int, why: str) -> None:
        with self._lock:
            held = self._held.pop(entry)
        self.journal.evicted(held.description.source.uri, "dram", held.description.manifest.nbytes, why)
        self._directory.withdraw(held.description.source.id, self.node, "dram")
        held.end_tee()
        with self._lock:
            held.close()
        self._handle(events.Evicted(entry))

    def _evict_image(self, asker: int, size: int, stays: str) -> None:
        with self._lock:
            asked = self._asked.pop(asker)
        asked.holder.deliver(EvictReply(size, self._keeping.evict(asked.evict_image), stays[:TEXT_LIMIT]), [])


def _account(holder: Holder) -> Account:
    return Account(holder.caller.account, holder.grant.dram)


def _may_have(grant: Grant, model: str) -> bool:
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


def _logged(work: Callable[..., None], *arguments: object) -> None:
    """Runs a job; what it raises is a fault of ours and must not vanish in a future that nobody reads."""
    try:
        work(*arguments)
    except Exception:
        log.exception("%s failed", work.__name__)
