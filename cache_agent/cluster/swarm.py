"""Owns one load's exchange with other nodes: which peer has which chunk, its believed digest, and all transfers.

    scout       (one thread)      finds nodes that have the model or load it, keeps our place among them
    follower    (one per peer)    receives which chunks the peer has and which it is reading
    dispatcher  (`run`)           asks policy.fanout for the next transfer, under the lock
    transfer    (a pool)          fetches one chunk from a peer, or reads it from the origin, outside the lock

A digest is believed when `witnesses` nodes that read the chunk from the origin state it, or `witnesses` + 1 nodes do
that have the chunk from anywhere, and no node states another; a chunk from a peer must have the believed digest. Where
the source's revision is known, one peer's statement is enough: the whole is proved before `ready`. In both cases a few
bytes of each chunk, at a random place, are compared with the origin while the origin answers. Nothing is taken for an
hour from a peer that gave other bytes.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from cache_agent.cluster.peer import Peer, PeerFailed, PeerLied
from cache_agent.errors import AgentError, OriginUnavailable
from cache_agent.loading.loader import ModelLoad
from cache_agent.loading.parallelism import Parallelism
from cache_agent.policy.fanout import ORIGIN, Fanout, Step
from cache_agent.wire.peers import ChunkStatement, Holds

log = logging.getLogger("glowplug.peers")

_TICK = 0.1
_SCOUT_SECONDS = 0.3
_SHUN_SECONDS = 15.0  # for a peer that failed
_LIAR_SECONDS = 3600.0
_SAMPLE = 16 << 10  # bytes of each chunk that are compared with the origin's
_MOST_PEERS = 32
_HOPE_SECONDS = 3.0
_HEAR_SECONDS = 1.0
_AGAIN_SECONDS = 0.2  # for a peer that has nothing of the model yet


class Liars:
    """Peers that gave other bytes than they stated, for all loads of this node. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def add(self, peer: str) -> None:
        with self._lock:
            self._until[peer] = time.monotonic() + _LIAR_SECONDS

    def __contains__(self, peer: str) -> bool:
        with self._lock:
            return self._until.get(peer, 0.0) > time.monotonic()


class Swarm:
    """Other nodes' part in one load. `invite` may be called from any thread, `run` once."""

    def __init__(
        self,
        load: ModelLoad,
        source: str,
        *,
        start: float,
        scout: Callable[[], Iterable[Peer]],
        liars: Liars,
        readers: int,
        proved: bool,
        witnesses: int = 1,
        origin_answers: bool = True,
    ) -> None:
        """`scout()` finds peers that may have the model, and may take a moment; `start` is our place, from 0 to 1.

        `proved`: the load proves the whole before it is ready. Otherwise `witnesses` nodes that read a chunk from the
        origin must state the same digest.
        """
        self._load = load
        self._source = source
        self._scout = scout
        self._liars = liars
        self._readers = readers
        self._proved = proved
        self._witnesses = witnesses
        self._origin_answers = origin_answers
        self._parallelism = Parallelism(readers)
        self._choose = random.SystemRandom()
        self._lock = threading.Lock()  # guards what follows
        self._changed = threading.Condition(self._lock)
        self._peers: dict[str, Peer] = {}
        chunks = len(load.checksums)
        self._fanout = Fanout(chunks, set(range(chunks)) - set(load.missing()), start=start)
        self._statements: list[dict[str, ChunkStatement]] = [{} for _ in range(chunks)]
        self._disputed: set[int] = set()  # chunks for which only the origin is asked
        self._reading: set[int] = set()
        self._origin_down = not origin_answers
        self._unheard: dict[str, float] = {}  # peers without a message; until then the origin is not read
        self._hope_until = 0.0  # until then a peer may still turn up
        self._failure: AgentError | None = None
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- for other threads ----------------------------------------------------------------------------------------

    def invite(self, peer: Peer) -> None:
        """Take in a peer that may have the model; a known one is closed."""
        now = time.monotonic()
        with self._lock:
            welcome = (
                not self._over.is_set()
                and peer.name not in self._peers
                and peer.name not in self._liars
                and not self._fanout.is_shunned(peer.name, now)
                and len(self._peers) < _MOST_PEERS
            )
            if welcome:
                self._peers[peer.name] = peer
                self._unheard[peer.name] = now + _HEAR_SECONDS
                thread = threading.Thread(target=self._follow, args=(peer,), name=f"peer-{peer.name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        if not welcome:
            peer.close()

    def reading(self) -> list[int]:
        with self._lock:
            return sorted(self._reading)

    # --- the dispatcher -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Fetch until all chunks are here, or peers cannot help. Raises an origin's error that peers cannot cure."""
        self._hope_until = time.monotonic() + _HOPE_SECONDS
        for peer in self._scout():
            self.invite(peer)
        scout = threading.Thread(target=self._look_out, name="scout", daemon=True)
        scout.start()
        try:
            with ThreadPoolExecutor(self._readers, thread_name_prefix="transfer") as pool:
                self._dispatch(pool)
        finally:
            self._over.set()
            with self._lock:
                peers, self._peers = list(self._peers.values()), {}
                threads = [scout, *self._threads]
            for peer in peers:
                peer.close()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure

    def _dispatch(self, pool: ThreadPoolExecutor) -> None:
        with self._lock:
            while not self._fanout.complete:
                now = time.monotonic()
                ending = self._failure is not None or self._load.stopped
                hopeless = self._origin_down and now > self._hope_until and not self._fanout.hopeful(now)
                if (ending or hopeless) and self._fanout.idle:
                    return
                unheard = any(until > now for until in self._unheard.values())
                limit = self._parallelism.observe(self._load.reader.arrived, now)
                # Other nodes' reads are known a moment later: in a small model all nodes would read the same chunks.
                limit = min(limit, max(1, self._fanout.chunks // (2 + 2 * len(self._peers))))
                limit = 0 if self._origin_down or unheard else limit
                while not ending and (step := self._fanout.next(now, limit)) is not None:
                    if step.peer == ORIGIN:
                        self._reading.add(step.chunk)
                    pool.submit(self._transfer, step)
                self._changed.wait(_TICK)

    def _transfer(self, step: Step) -> None:
        done = False
        try:
            if step.peer == ORIGIN:
                self._load.reader.read_chunk(step.chunk)
                done = True
            else:
                done = self._from_peer(step)
        except OriginUnavailable as error:
            log.warning("%s; asking peers", error)
            with self._lock:
                self._origin_down = True
                self._parallelism.trouble()
        except AgentError as error:
            self._failure = self._failure or error
        except Exception as error:  # an unexpected fault must end the load, not only this thread
            log.exception("loading %s failed", self._source)
            self._failure = self._failure or AgentError(f"loading failed inside the agent: {error!r}")
        finally:
            with self._lock:
                if step.peer == ORIGIN:
                    self._reading.discard(step.chunk)
                if done:
                    self._fanout.finished(step)
                else:
                    self._fanout.failed(step)
                self._changed.notify_all()
        if done and step.peer == ORIGIN:
            self._judge(step.chunk)

    def _from_peer(self, step: Step) -> bool:
        with self._lock:
            peer = self._peers.get(step.peer)
            believed = self._believed(step.chunk)
        if peer is None:
            return False
        try:
            with self._load.view(step.chunk) as view:
                digest = peer.fetch(self._source, step.chunk, view)
        except PeerLied as error:
            self._lied(step.peer, str(error))
        except PeerFailed as error:
            self._drop(step.peer, str(error), _SHUN_SECONDS)
        else:
            if believed is None:
                pass  # the chunk became disputed meanwhile
            elif believed not in ("", digest):
                self._lied(step.peer, f"chunk {step.chunk} is not what it is known to be")
            elif not self._load.fits(step.chunk) or not self._sampled(step.chunk):
                self._lied(step.peer, f"chunk {step.chunk} is not what the origin has")
            else:
                self._load.accept(step.chunk, digest, step.peer)
                return True
        self._load.reopen(step.chunk)
        return False

    def _sampled(self, chunk: int) -> bool:
        if self._origin_down or not self._origin_answers:
            return True
        try:
            return self._load.reader.sample(chunk, _SAMPLE, self._choose)
        except OriginUnavailable as error:
            log.warning("%s; what peers give cannot be compared with it", error)
            self._origin_answers = False
            return True

    # --- peers' statements -----------------------------------------------------------------------------------------

    def _follow(self, peer: Peer) -> None:
        why = "it ended"
        try:
            peer.follow(self._source, lambda message: self._take_in(peer.name, message))
        except PeerLied as error:
            self._lied(peer.name, str(error))
            return
        except PeerFailed as error:
            why = str(error)
        except Exception as error:
            log.exception("following %s failed", peer.name)
            why = repr(error)
        with self._lock:
            answered = peer.name not in self._unheard
        self._drop(peer.name, why, _SHUN_SECONDS if answered else _AGAIN_SECONDS)

    def _take_in(self, peer: str, message: Holds) -> None:
        doubted = []
        with self._lock:
            self._unheard.pop(peer, None)
            if peer not in self._peers:
                return
            chunks = self._fanout.chunks
            self._fanout.reads(peer, [chunk for chunk in message.reading if chunk < chunks], time.monotonic())
            for said in message.said:
                if said.chunk >= chunks:
                    continue
                self._statements[said.chunk][peer] = said
                self._weigh(said.chunk)
                if said.digest and self._load.digest_of(said.chunk) not in ("", said.digest):
                    doubted.append(said.chunk)
            self._changed.notify_all()
        for chunk in doubted:
            self._doubt(chunk)

    def _believed(self, chunk: int) -> str | None:
        """Return the digest that a peer's chunk must have; "" for any digest, None to take the chunk from no peer."""
        if chunk in self._disputed:
            return None
        statements = [said for said in self._statements[chunk].values() if said.digest]
        digests = {said.digest for said in statements}
        if len(digests) > 1:
            return None
        if sum(said.own for said in statements) >= self._witnesses or len(statements) > self._witnesses:
            return statements[0].digest
        return "" if self._proved and self._statements[chunk] else None

    def _weigh(self, chunk: int) -> None:
        """Offer a chunk's holders to the fan-out if the chunk can be checked, else take them back. Under the lock."""
        takeable = self._believed(chunk) is not None
        for peer in self._statements[chunk]:
            if takeable:
                self._fanout.has(peer, chunk)
            else:
                self._fanout.has_not(peer, chunk)

    def _doubt(self, chunk: int) -> None:
        """Settle a statement that differs from our chunk: one that came from a peer is read again from the origin."""
        with self._lock:
            self._disputed.add(chunk)
            self._weigh(chunk)
            given = chunk in self._load.given
        if given and not self._over.is_set():
            log.warning("nodes disagree on chunk %d of %s; reading the origin", chunk, self._source)
            self._load.reopen(chunk)
            with self._lock:
                self._fanout.reopen(chunk)
                self._changed.notify_all()
        elif not given:
            self._judge(chunk)

    def _judge(self, chunk: int) -> None:
        """Shun the peers that stated another digest than that of the origin's bytes, which are here."""
        truth = self._load.digest_of(chunk)
        with self._lock:
            others = [peer for peer, said in self._statements[chunk].items() if said.digest not in ("", truth)]
        for peer in others if truth else ():
            self._lied(peer, f"chunk {chunk} is not what it says")

    def _lied(self, peer: str, why: str) -> None:
        self._liars.add(peer)
        self._drop(peer, why, _LIAR_SECONDS)

    def _drop(self, name: str, why: str, seconds: float) -> None:
        with self._lock:
            peer = self._peers.pop(name, None)
            self._unheard.pop(name, None)
            self._fanout.shun(name, time.monotonic() + seconds)
            if seconds == _LIAR_SECONDS:
                for chunk, statements in enumerate(self._statements):
                    if statements.pop(name, None) is not None:
                        self._weigh(chunk)
            self._changed.notify_all()
        if peer is not None:
            if not self._over.is_set():
                level = logging.DEBUG if seconds == _AGAIN_SECONDS else logging.WARNING
                log.log(level, "taking nothing from node %s for %.0f s: %s", name, seconds, why)
            peer.close()

    # --- looking for peers ----------------------------------------------------------------------------------------

    def _look_out(self) -> None:
        while not self._over.is_set():
            try:
                for peer in self._scout():
                    self.invite(peer)
            except Exception:
                log.exception("looking for peers failed")
            self._over.wait(_SCOUT_SECONDS)
