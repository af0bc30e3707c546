"""Which chunk of a model to take next, and from whom, when many nodes load it at once. Pure.

The origin is to be read about once, whatever the number of nodes. Each reads there only what nobody has and nobody is
reading, from a place of its own onwards; all the rest comes from those who have it, the rarest chunks first. This is
λScale's multicast without a tree: nobody depends on a certain other one, and whoever dies leaves only what he was
reading, which others take over after `patience`.

Places are fractions of the model in van der Corput's order (0, 1/2, 1/4, 3/4, 1/8, …): they are far apart however many
there are. Who is alone starts at 0 and so reads in the order in which the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ORIGIN = ""


class Step(NamedTuple):
    """Take `chunk` from `peer`, or from the origin."""

    chunk: int
    peer: str


def place(slot: int) -> float:
    """Where the node with this number begins: a fraction of the model."""
    result, scale = 0.0, 0.5
    while slot:
        result += scale * (slot & 1)
        slot >>= 1
        scale /= 2
    return result


class Fanout:
    """What one load knows of its chunks and of its peers. One caller at a time."""

    def __init__(
        self,
        chunks: int,
        finished: Iterable[int] = (),
        *,
        start: float = 0.0,
        per_peer: int = 2,
        patience: float = 10.0,
    ) -> None:
        """`per_peer` transfers at once from each; what a peer reads counts for `patience` seconds as on its way."""
        self.chunks = chunks
        self._start = int(start * chunks)
        self._per_peer = per_peer
        self._patience = patience
        self._missing = set(range(chunks)) - set(finished)  # not here, and not on the way
        self._busy: dict[int, str] = {}
        self._transfers: dict[str, int] = {}
        self._read_here: set[int] = set()  # from the origin
        self._has: dict[str, set[int]] = {}
        self._holders = [0] * chunks
        self._reading: dict[str, dict[int, float]] = {}
        self._shunned: dict[str, float] = {}

    # --- what became known ----------------------------------------------------------------------------------------

    def has(self, peer: str, chunk: int) -> None:
        """A peer has a chunk whose bytes can be checked."""
        if self._shunned.get(peer) is None and chunk not in self._has.setdefault(peer, set()):
            self._has[peer].add(chunk)
            self._holders[chunk] += 1

    def has_not(self, peer: str, chunk: int) -> None:
        if chunk in self._has.get(peer, ()):
            self._has[peer].discard(chunk)
            self._holders[chunk] -= 1

    def reads(self, peer: str, chunks: Iterable[int], now: float) -> None:
        """All that a peer is reading from the origin now."""
        before = self._reading.get(peer, {})
        self._reading[peer] = {chunk: before.get(chunk, now) for chunk in chunks}

    def gone(self, peer: str) -> None:
        """A peer ended or is out of reach."""
        for chunk in self._has.pop(peer, ()):
            self._holders[chunk] -= 1
        self._reading.pop(peer, None)

    def shun(self, peer: str, until: float) -> None:
        """Takes nothing from a peer for a while, and does not wait for what it reads."""
        self.gone(peer)
        self._shunned[peer] = until

    def is_shunned(self, peer: str, now: float) -> bool:
        if self._shunned.get(peer, now) <= now:
            self._shunned.pop(peer, None)
            return False
        return True

    def finished(self, step: Step) -> None:
        """The chunk is here, and right."""
        self._over(step)
        if step.peer == ORIGIN:
            self._read_here.add(step.chunk)

    def failed(self, step: Step) -> None:
        """The chunk is still missing; what is to become of the peer is said apart."""
        self._over(step)
        self._missing.add(step.chunk)

    def reopen(self, chunk: int) -> None:
        """What was here is not to be believed any more."""
        if chunk not in self._busy:
            self._missing.add(chunk)

    def _over(self, step: Step) -> None:
        del self._busy[step.chunk]
        self._transfers[step.peer] -= 1

    # --- what to do -----------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        return not self._missing and not self._busy

    @property
    def idle(self) -> bool:
        """Nothing is on its way to here."""
        return not self._busy

    def hopeful(self, now: float) -> bool:
        """Peers have something that is missing, or are reading it."""
        claimed = self._claimed(now)
        return any(self._holders[chunk] or chunk in claimed for chunk in self._missing)

    def next(self, now: float, origin_reads: int) -> Step | None:
        """The next transfer to begin, or None while there is none; at most `origin_reads` at once from the origin."""
        step = None
        if self._transfers.get(ORIGIN, 0) < origin_reads and (chunk := self._unclaimed(now)) is not None:
            step = Step(chunk, ORIGIN)
        else:
            step = self._rarest()
        if step is not None:
            self._missing.discard(step.chunk)
            self._busy[step.chunk] = step.peer
            self._transfers[step.peer] = self._transfers.get(step.peer, 0) + 1
        return step

    def _claimed(self, now: float) -> set[int]:
        return {
            chunk
            for claims in self._reading.values()
            for chunk, since in claims.items()
            if now - since < self._patience
        }

    def _unclaimed(self, now: float) -> int | None:
        """What nobody has and nobody reads: the next one of our own run, or the far end of a run of others.

        The far end, because the near one is what whoever is reading there will take next.
        """
        claimed = self._claimed(now)
        free = {chunk for chunk in self._missing if not self._holders[chunk] and chunk not in claimed}
        if not free:
            return None
        first = min(free, key=self._distance)
        before = (first - 1) % self.chunks
        if first == self._start or before in self._read_here or self._busy.get(before) == ORIGIN:
            return first
        last = first
        while (last + 1) % self.chunks in free and (last + 1) % self.chunks != self._start:
            last = (last + 1) % self.chunks
        return last

    def _rarest(self) -> Step | None:
        open_peers = [peer for peer in self._has if self._transfers.get(peer, 0) < self._per_peer]
        best: tuple[int, int, int, str] | None = None
        for peer in sorted(open_peers):
            for chunk in self._has[peer] & self._missing:
                rank = (self._holders[chunk], self._distance(chunk), self._transfers.get(peer, 0), peer)
                if best is None or rank < best:
                    best, found = rank, chunk
        return Step(found, best[3]) if best is not None else None

    def _distance(self, chunk: int) -> int:
        return (chunk - self._start) % self.chunks
