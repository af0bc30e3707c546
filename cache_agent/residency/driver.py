"""Carries out residency's actions (resolve, load, admit, adopt, evict) and reports the outcome of each as an event.

Work runs in the driver's own threads, outside the ledger's lock.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

from cache_agent.cluster.directory import Directory, Holding
from cache_agent.cluster.peers import Peers
from cache_agent.config import AgentConfig
from cache_agent.errors import OriginChanged, translated
from cache_agent.journal.journal import Journal
from cache_agent.loading.loader import ModelLoad
from cache_agent.model import content
from cache_agent.model.uri import parse_uri
from cache_agent.policy.estimate import Estimate
from cache_agent.residency import events
from cache_agent.residency.background import HERE, Background, Lane, here, lane_of
from cache_agent.residency.events import Action, Event
from cache_agent.residency.ledger import ResidencyLedger
from cache_agent.residency.memory import EntryMemory
from cache_agent.residency.resolving import Resolution, Resolver
from cache_agent.residency.retention import Retention
from cache_agent.residency.revisions import Revisions
from cache_agent.tiers.dram import Dram

log = logging.getLogger("glowplug.agent")

_OF_ORIGIN, _OF_PLACE = 16, 8  # resolutions at once, and as many loads


class EventHandler(Protocol):
    """Passes an event to residency; `resolved` is what a load that follows from the event is to read."""

    def __call__(self, event: Event, *, resolved: Resolution | None = None) -> None: ...


class Driver:
    """The threads that carry residency's actions out. Any thread."""

    def __init__(
        self,
        config: AgentConfig,
        ledger: ResidencyLedger,
        directory: Directory,
        journal: Journal,
        retention: Retention,
        revisions: Revisions,
        resolver: Resolver,
        peers: Peers | None,
        handle: EventHandler,
    ) -> None:
        self._config, self._ledger, self._directory, self._journal = config, ledger, directory, journal
        self._retention, self._revisions, self._resolver, self._peers = retention, revisions, resolver, peers
        self._handle = handle
        self._resolves = Background("resolve", of_origin=_OF_ORIGIN, of_place=_OF_PLACE)
        self._loads = Background("load", of_origin=_OF_ORIGIN, of_place=_OF_PLACE)
        self._admissions = ThreadPoolExecutor(1, thread_name_prefix="admission")

    def act(self, action: Action, resolved: Resolution | None) -> None:
        """Begin an action; an eviction is over when `act` returns."""
        with contextlib.suppress(RuntimeError):  # the pools are shut down, and so is every holder
            match action:
                case events.Resolve(uri):
                    self._resolves.submit(self._lane(uri), self._resolve, uri)
                case events.Load(entry, plan, uri):
                    assert resolved is not None, "a load follows from a resolution"
                    lane = self._lane(uri)
                    if self._retention.chunks(plan.source):  # only damaged chunks are read from the origin
                        lane = here(lane)
                    self._loads.submit(lane, self._load, entry, resolved)
                case events.Admit(entry):
                    self._admissions.submit(_logged, self._admit, entry)
                case events.Adopt(_, entry):
                    self._loads.submit(HERE, self._adopted, entry)
                case events.Evict(entry, why):
                    self._evict(entry, why)

    def later(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread of ours: the caller may hold the ledger's lock, which `work` needs."""
        with contextlib.suppress(RuntimeError):  # the pool is shut down, and with it all leases
            self._resolves.submit(HERE, work)

    def close(self, deadline: float) -> None:
        """Stop loads and give all memory back; mapped segments live on in the functions that map them.

        A load that does not end until `deadline` (time.monotonic) keeps its memory.
        """
        ledger = self._ledger
        with ledger.lock:
            ledger.closing = True
            loads = [memory.load for memory in ledger.memories.values() if memory.load is not None]
        for load in loads:
            load.stop()
        self._resolves.close()
        self._loads.close()
        self._admissions.shutdown(wait=False, cancel_futures=True)
        for load in loads:
            load.finished.wait(max(0.0, deadline - time.monotonic()))
        with ledger.lock:
            memories = list(ledger.memories.values())
        for memory in memories:
            memory.end_tee(max(0.0, deadline - time.monotonic()))
        with ledger.lock:
            for memory in memories:
                if memory.load is None or memory.load.finished.is_set():
                    memory.close()

    def _lane(self, uri: str) -> Lane:
        return lane_of(parse_uri(uri), self._config.file_roots)

    # --- work -----------------------------------------------------------------------------------------------------

    def _resolve(self, uri: str) -> None:
        try:
            found = self._resolver.resolve(uri)
        except Exception as error:
            self._handle(events.ResolveFailed(uri, translated(error, uri)))
            return
        self._handle(events.Resolved(uri, found.description.manifest, found.revision), resolved=found)

    def _load(self, entry: int, resolution: Resolution) -> None:
        memory = EntryMemory(resolution.description, resolution.phases)
        start = time.monotonic()
        with ExitStack() as opened:
            try:
                load = self._prepared(entry, memory, resolution, opened)
                expected = self._entered(entry, memory, load)
                self._transferred(memory, load, resolution)
            except Exception as error:
                self._failed(entry, memory, resolution, error)
                return
        self._complete(entry, memory, resolution.origin.uri, load, expected, time.monotonic() - start)

    def _prepared(self, entry: int, memory: EntryMemory, resolution: Resolution, opened: ExitStack) -> ModelLoad:
        """Reserve memory, and choose between the image on SSD, which `opened` closes, and the origin."""
        description, origin, phases, known, _ = resolution
        plan = description.manifest
        if self._peers is not None and not known:  # a stated revision is proved before the model is ready
            known = self._revisions.stated(description.source.id, self._config.peer_witnesses)
        with phases.span("reserve"):
            memory.dram = Dram(plan.segments, huge_pages=self._config.huge_pages, name=f"glowplug:{entry}")
            memory.keep_manifest()
        image = self._retention.open(plan)
        if image is not None:
            opened.callback(image.close)
        memory.load = load = ModelLoad(
            description,
            origin,
            memory.dram,
            readers=self._config.readers,
            image=image,
            with_digests=self._peers is not None,
            known=known,
        )
        if image is not None:
            memory.tier = "ssd"
        else:
            memory.tee = load.tee = self._retention.follow(memory.dram, description, origin.uri, resolution.revision)
        return load

    def _entered(self, entry: int, memory: EntryMemory, load: ModelLoad) -> Estimate:
        """Enter the memory in ledger and directory, after which it may be lent; return the load's estimate."""
        with self._ledger.lock:
            expected = self._ledger.expect(memory)
            self._ledger.memories[entry] = memory
            if self._ledger.closing:
                load.stop()
        self._handle(events.Reserved(entry))
        self._publish(load)
        return expected

    def _transferred(self, memory: EntryMemory, load: ModelLoad, resolution: Resolution) -> None:
        """Read every byte, and measure how fast the tier was."""
        if self._peers is not None:  # other nodes may fetch from the load from here on
            load.helper = self._peers.helper(load, load.manifest.source, origin_answers=resolution.answers)
        load.observer = lambda: self._publish(load)
        began = time.monotonic()
        with resolution.phases.span("transfer"):
            load.run()
        if len(load.given) * 2 > memory.description.manifest.chunk_count:
            memory.tier = "peer"
        rate = load.total / max(time.monotonic() - began, 1e-9)
        self._directory.measured(self._config.node_name, memory.tier, rate)

    def _failed(self, entry: int, memory: EntryMemory, resolution: Resolution, error: Exception) -> None:
        source, uri = memory.description.manifest.source, resolution.origin.uri
        self._journal.failed(uri, memory.tier, str(error))
        self._directory.withdraw(source, self._config.node_name, "dram")
        if memory.load and memory.load.damaged and isinstance(error, OriginChanged):
            self._retention.discard(source)
        memory.end_tee()
        with self._ledger.lock:  # a function that is refused and asks again finds the memory free
            self._ledger.memories.pop(entry, None)
            memory.close()
            self._handle(events.LoadFailed(entry, translated(error, uri)))

    def _complete(
        self, entry: int, memory: EntryMemory, uri: str, load: ModelLoad, expected: Estimate, seconds: float
    ) -> None:
        """Report the load's end; then complete its image on SSD, or repair what the image had damaged."""
        guess = expected.confidence == 0
        assert memory.dram is not None, "closed by an eviction only, which follows from `Loaded`"
        self._journal.loaded(
            uri, memory.tier, load.total, seconds, expected.seconds, guess=guess, page=memory.dram.page
        )
        self._ledger.learn(memory, expected, seconds)
        self._publish(load)
        self._handle(events.Loaded(entry, seconds))
        if load.tee is not None:
            load.tee.complete(load.checksums, seconds)
        elif load.damaged:
            with self._ledger.lock:
                maps = memory.dram.map() if memory.dram is not None else []
            if maps:
                self._retention.repair(load, maps)

    def _publish(self, load: ModelLoad) -> None:
        self._directory.publish(load.manifest.source, self._holding(load))

    def _holding(self, load: ModelLoad) -> Holding:
        return Holding(self._config.node_name, "dram", load.progress()[1], load.total)

    def _admit(self, entry: int) -> None:
        with self._ledger.lock:
            memory = self._ledger.memories.get(entry)
            if memory is None or memory.dram is None:
                return
            maps = memory.dram.map()
        try:
            proved = memory.load.proved if memory.load is not None else ""
            revision = proved or content.digest(memory.description, maps)
        finally:
            for mapping in maps:
                mapping.close()
        if memory.tee is None:  # otherwise the tee seals it at its end
            with self._ledger.lock:
                if memory.dram is not None:
                    memory.dram.seal()
        self._revisions.remember(memory.description.source.id, revision)
        self._handle(events.Admitted(entry, revision))

    def _adopted(self, entry: int) -> None:
        """Publish adopted memory to other nodes, and write it to SSD where the image is missing."""
        with self._ledger.lock:
            memory = self._ledger.memories.get(entry)
            if memory is None or memory.dram is None or self._ledger.closing:
                return
            plan, uri = memory.description.manifest, memory.description.source.uri
            self._directory.publish(plan.source, Holding(self._config.node_name, "dram", plan.nbytes, plan.nbytes))
            if self._retention.chunks(plan.source):
                return
            revision = self._ledger.residency.entries[entry].revision
            memory.tee = tee = self._retention.follow(memory.dram, memory.description, uri, revision)
            maps = memory.dram.map() if tee is not None else []
        if tee is not None:
            tee.follow_memory(maps, self._ledger.predict("origin", plan.nbytes).seconds)

    def _evict(self, entry: int, why: str) -> None:
        with self._ledger.lock:
            memory = self._ledger.memories.pop(entry)
        self._journal.evicted(memory.description.source.uri, "dram", memory.description.manifest.nbytes, why)
        self._directory.withdraw(memory.description.source.id, self._config.node_name, "dram")
        memory.end_tee()
        with self._ledger.lock:
            memory.close()
        self._handle(events.Evicted(entry))


def _logged(work: Callable[..., None], *arguments: object) -> None:
    """Run `work`, and log what it raises: an unexpected fault must not vanish in a future that nobody reads."""
    try:
        work(*arguments)
    except Exception:
        log.exception("%s failed", work.__name__)
