"""Carries out what residency decided: resolves, loads, admits, evicts; outside the books' lock, in threads of its own.

What came of it goes back as an event.
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
from cache_agent.residency.leases import EntryMemory, Resolution
from cache_agent.residency.ledger import ResidencyLedger
from cache_agent.residency.resolving import Resolver
from cache_agent.residency.retention import Retention
from cache_agent.residency.revisions import Revisions
from cache_agent.tiers.dram import Dram

log = logging.getLogger("glowplug.agent")

_OF_ORIGIN, _OF_PLACE = 16, 8  # resolved at once, and loaded at once


class Tell(Protocol):
    """Takes an event to residency; `resolved` is what a `ModelLoad` that follows from it is to read."""

    def __call__(self, event: Event, *, resolved: Resolution | None = None) -> None: ...


class Driver:
    """Every method may be called from any thread."""

    def __init__(
        self,
        config: AgentConfig,
        books: ResidencyLedger,
        directory: Directory,
        journal: Journal,
        keeping: Retention,
        revisions: Revisions,
        resolver: Resolver,
        peers: Peers | None,
        tell: Tell,
    ) -> None:
        self._config, self._books, self._directory, self._journal = config, books, directory, journal
        self._keeping, self._revisions, self._resolver, self._peers = keeping, revisions, resolver, peers
        self._tell = tell
        self._resolves = Background("resolve", of_origin=_OF_ORIGIN, of_place=_OF_PLACE)
        self._loads = Background("load", of_origin=_OF_ORIGIN, of_place=_OF_PLACE)
        self._admissions = ThreadPoolExecutor(1, thread_name_prefix="admission")

    def act(self, action: Action, resolved: Resolution | None) -> None:
        """Begins what an action stands for; an eviction is over when this returns."""
        with contextlib.suppress(RuntimeError):  # the pools are shut down: so are all who would hear of the result
            match action:
                case events.Resolve(uri):
                    self._resolves.submit(self._lane(uri), self._resolve, uri)
                case events.Load(entry, plan, uri):
                    assert resolved is not None, "a load follows from a resolution"
                    lane = self._lane(uri)
                    if self._keeping.chunks(plan.source):  # only damaged chunks make it ask the origin
                        lane = here(lane)
                    self._loads.submit(lane, self._load, entry, resolved)
                case events.Admit(entry):
                    self._admissions.submit(_logged, self._admit, entry)
                case events.Adopt(_, entry):
                    self._loads.submit(HERE, self._adopted, entry)
                case events.Evict(entry, why):
                    self._evict(entry, why)

    def later(self, work: Callable[[], None]) -> None:
        """Runs this when whoever calls is done with deciding."""
        with contextlib.suppress(RuntimeError):  # the pool is shut down, and with it all leases
            self._resolves.submit(HERE, work)

    def close(self, deadline: float) -> None:
        """Stops loads and gives all memory back; mapped segments live on in the functions that map them."""
        books = self._books
        with books.lock:
            books.closing = True
            loads = [held.load for held in books.held.values() if held.load is not None]
        for load in loads:
            load.stop()
        self._resolves.close()
        self._loads.close()
        self._admissions.shutdown(wait=False, cancel_futures=True)
        for load in loads:
            load.finished.wait(max(0.0, deadline - time.monotonic()))
        with books.lock:
            helds = list(books.held.values())
        for held in helds:
            held.end_tee(max(0.0, deadline - time.monotonic()))
        with books.lock:
            for held in helds:
                if held.load is None or held.load.finished.is_set():
                    held.close()

    def _lane(self, uri: str) -> Lane:
        return lane_of(parse_uri(uri), self._config.file_roots)

    # --- work -----------------------------------------------------------------------------------------------------

    def _resolve(self, uri: str) -> None:
        try:
            found = self._resolver.resolve(uri)
        except Exception as error:
            self._tell(events.ResolveFailed(uri, translated(error, uri)))
            return
        self._tell(events.Resolved(uri, found.description.manifest, found.revision), resolved=found)

    def _load(self, entry: int, resolution: Resolution) -> None:
        memory = EntryMemory(resolution.description, resolution.ledger)
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
        description, origin, ledger, known, _ = resolution
        plan = description.manifest
        if self._peers is not None and not known:  # what others found it to be is proved before anything is ready
            known = self._revisions.stated(description.source.id, self._config.peer_witnesses)
        with ledger.span("reserve"):
            memory.dram = Dram(plan.segments, huge_pages=self._config.huge_pages, name=f"glowplug:{entry}")
            memory.keep_manifest()
        image = self._keeping.open(plan)
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
            memory.tee = load.tee = self._keeping.follow(memory.dram, description, origin.uri, resolution.revision)
        return load

    def _entered(self, entry: int, memory: EntryMemory, load: ModelLoad) -> Estimate:
        """Tell residency, which may lend the memory from here on, and the directory; how long the load should take."""
        with self._books.lock:
            expected = self._books.expect(memory)
            self._books.held[entry] = memory
            if self._books.closing:
                load.stop()
        self._tell(events.Reserved(entry))
        self._publish(load)
        return expected

    def _transferred(self, memory: EntryMemory, load: ModelLoad, resolution: Resolution) -> None:
        """Read every byte, and measure how fast the tier was."""
        if self._peers is not None:  # others may ask us about it from here on
            load.helper = self._peers.helper(load, load.manifest.source, origin_answers=resolution.answers)
        load.observer = lambda: self._publish(load)
        began = time.monotonic()
        with resolution.ledger.span("transfer"):
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
            self._keeping.discard(source)
        memory.end_tee()
        with self._books.lock:  # a function that hears of it and asks again finds the memory free
            self._books.held.pop(entry, None)
            memory.close()
            self._tell(events.LoadFailed(entry, translated(error, uri)))

    def _complete(
        self, entry: int, memory: EntryMemory, uri: str, load: ModelLoad, expected: Estimate, seconds: float
    ) -> None:
        """Tell that the bytes are there; then the SSD tier gets them, or what it had damaged."""
        guess = expected.confidence == 0
        assert memory.dram is not None, "closed by an eviction only, which follows from `Loaded`"
        self._journal.loaded(
            uri, memory.tier, load.total, seconds, expected.seconds, guess=guess, page=memory.dram.page
        )
        self._books.learn(memory, expected, seconds)
        self._publish(load)
        self._tell(events.Loaded(entry, seconds))
        if load.tee is not None:
            load.tee.complete(load.checksums, seconds)
        elif load.damaged:
            with self._books.lock:
                maps = memory.dram.map() if memory.dram is not None else []
            if maps:
                self._keeping.repair(load, maps)

    def _publish(self, load: ModelLoad) -> None:
        self._directory.publish(load.manifest.source, self._holding(load))

    def _holding(self, load: ModelLoad) -> Holding:
        return Holding(self._config.node_name, "dram", load.progress()[1], load.total)

    def _admit(self, entry: int) -> None:
        with self._books.lock:
            held = self._books.held.get(entry)
            if held is None or held.dram is None:
                return
            maps = held.dram.map()
        try:
            proved = held.load.proved if held.load is not None else ""
            revision = proved or content.digest(held.description, maps)
        finally:
            for mapping in maps:
                mapping.close()
        if held.tee is None:  # otherwise the tee does it at its end
            with self._books.lock:
                if held.dram is not None:
                    held.dram.seal()
        self._revisions.remember(held.description.source.id, revision)
        self._tell(events.Admitted(entry, revision))

    def _adopted(self, entry: int) -> None:
        """Memory of an earlier agent is ours now: other nodes hear of it, and the SSD tier gets what it lacks."""
        with self._books.lock:
            held = self._books.held.get(entry)
            if held is None or held.dram is None or self._books.closing:
                return
            plan, uri = held.description.manifest, held.description.source.uri
            self._directory.publish(plan.source, Holding(self._config.node_name, "dram", plan.nbytes, plan.nbytes))
            if self._keeping.chunks(plan.source):
                return
            revision = self._books.residency.entries[entry].revision
            held.tee = tee = self._keeping.follow(held.dram, held.description, uri, revision)
            maps = held.dram.map() if tee is not None else []
        if tee is not None:
            tee.follow_memory(maps, self._books.predict("origin", plan.nbytes).seconds)

    def _evict(self, entry: int, why: str) -> None:
        with self._books.lock:
            held = self._books.held.pop(entry)
        self._journal.evicted(held.description.source.uri, "dram", held.description.manifest.nbytes, why)
        self._directory.withdraw(held.description.source.id, self._config.node_name, "dram")
        held.end_tee()
        with self._books.lock:
            held.close()
        self._tell(events.Evicted(entry))


def _logged(work: Callable[..., None], *arguments: object) -> None:
    """Runs a job; what it raises is a fault of ours and must not vanish in a future that nobody reads."""
    try:
        work(*arguments)
    except Exception:
        log.exception("%s failed", work.__name__)
