"""The choice of the next chunk, and of its source, when many nodes load one model at once. Pure.

The origin is to be read about once, whatever the number of nodes. Each node reads there only chunks that no node has or
is reading, from a place of its own onwards, and takes all others from the nodes that have them, the rarest chunks
first. This is λScale's multicast without a tree: no node depends on a certain other one. A node that dies leaves only
the chunks that it was reading, which others take over after `patience`.

Places are fractions of the model in van der Corput's order (0, 1/2, 1/4, 3/4, 1/8, …), which are far apart for any
number of nodes. A node alone starts at 0, and so reads in the order in which the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ORIGIN = ""


class Step(NamedTuple):
    """One transfer: `chunk` from `peer`, or from the origin where `peer` is ORIGIN."""

    chunk: int
    peer: str


def place(slot: int) -> float:
    """Return the fraction of the model at which the node with number `slot` begins."""
    result, scale = 0.0, 0.5
    while slot:
        result += scale * (slot & 1)
        slot >>= 1
        scale /= 2
    return result


class Fanout:
    """One load's view of its chunks and of its peers. One caller at a time."""

    def __init__(
        self,
        chunks: int,
        finished: Iterable[int] = (),
        *,
        start: float = 0.0,
        per_peer: int = 2,
        patience: float = 10.0,
    ) -> None:
        """Begin at the fraction `start` of the model, with at most `per_peer` transfers at once from each peer.

        A chunk that a peer reads from the origin is left to that peer for `patience` seconds.
        """
        self.chunks = chunks
        self._start = int(start * chunks)
        self._per_peer = per_peer
        self._patience = patience
        self._missing = set(range(chunks)) - set(finished)  # neither here nor on their way
        self._busy: dict[int, str] = {}
        self._transfers: dict[str, int] = {}
        self._read_here: set[int] = set()  # chunks that this node read from the origin
        self._has: dict[str, set[int]] = {}
        self._holders = [0] * chunks
        self._reading: dict[str, dict[int, float]] = {}
        self._shunned: dict[str, float] = {}

    # --- what became known ----------------------------------------------------------------------------------------

    def has(self, peer: str, chunk: int) -> None:
        """Take note that a peer has a chunk whose bytes can be checked."""
        if self._shunned.get(peer) is None and chunk not in self._has.setdefault(peer, set()):
            self._has[peer].add(chunk)
            self._holders[chunk] += 1

    def has_not(self, peer: str, chunk: int) -> None:
        """Take note that a peer does not have a chunk any more."""
        if chunk in self._has.get(peer, ()):
            self._has[peer].discard(chunk)
            self._holders[chunk] -= 1

    def reads(self, peer: str, chunks: Iterable[int], now: float) -> None:
        """Replace the chunks that a peer is reading from the origin; `now` in seconds of the caller's clock."""
        before = self._reading.get(peer, {})
        self._reading[peer] = {chunk: before.get(chunk, now) for chunk in chunks}

    def gone(self, peer: str) -> None:
        """Forget a peer that ended or is out of reach."""
        for chunk in self._has.pop(peer, ()):
            self._holders[chunk] -= 1
        self._reading.pop(peer, None)

    def shun(self, peer: str, until: float) -> None:
        """Take nothing from a peer until `until`, and wait for none of the chunks that it reads."""
        self.gone(peer)
        self._shunned[peer] = until

    def is_shunned(self, peer: str, now: float) -> bool:
        if self._shunned.get(peer, now) <= now:
            self._shunned.pop(peer, None)
            return False
        return True

    def finished(self, step: Step) -> None:
        """Take note that a step's chunk is here, and right."""
        self._over(step)
        if step.peer == ORIGIN:
            self._read_here.add(step.chunk)

    def failed(self, step: Step) -> None:
        """Take note that a step brought nothing; `shun` or `gone` says what becomes of its peer."""
        self._over(step)
        self._missing.add(step.chunk)

    def reopen(self, chunk: int) -> None:
        """Count a chunk as missing again, because its bytes turned out to be wrong."""
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
        """Whether no transfer is under way."""
        return not self._busy

    def hopeful(self, now: float) -> bool:
        """Return whether peers have, or are reading, any chunk that is missing here."""
        claimed = self._claimed(now)
        return any(self._holders[chunk] or chunk in claimed for chunk in self._missing)

    def next(self, now: float, origin_reads: int) -> Step | None:
        """Return the next transfer, now begun, or None while there is none; at most `origin_reads` from the origin."""
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
        """Return a chunk that no node has or reads: the next of this node's own run, else the end of another's run.

        The end, because the node that reads that run from its beginning takes the near chunks next.
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
        """Return the transfer of the missing chunk that the fewest peers have."""
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
