"""The plan of a load: which ranges of which files to ask an origin for, and where their bytes go. Pure.

    file    ───┬───────── range ─────────┬───      one request, `size` bytes from `start`
               │ piece │ piece  │ piece  │
    segment  ..└───────┘pad└────┴────────┘..       neighbours in the file; in memory there may be padding between

A request costs a store's round trip, so a range spans chunks; a piece never does, so a chunk is complete when its
pieces are. Ranges come in execution order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from cache_agent.model import manifest as manifests
from cache_agent.model.manifest import Manifest

LARGEST = 16 << 20  # bytes; longer ranges hide a store's round trip no better
SMALLEST = 4 << 20
_SPREAD = 8  # ranges that a small model is cut into, about: one reader alone is slow


class Piece(NamedTuple):
    """`size` bytes at `offset` of a segment, inside chunk number `chunk`."""

    chunk: int
    segment: int
    offset: int
    size: int


class Range(NamedTuple):
    """`size` bytes from `start` of weight file number `file`, and the pieces of memory that they fill, in order."""

    file: int
    start: int
    size: int
    pieces: tuple[Piece, ...]

    def after(self, done: int) -> tuple[Piece, ...]:
        """Return the pieces, or the rests of pieces, that are missing when the first `done` bytes are there."""
        left = []
        for piece in self.pieces:
            skipped = min(done, piece.size)
            done -= skipped
            if skipped < piece.size:
                left.append(piece._replace(offset=piece.offset + skipped, size=piece.size - skipped))
        return tuple(left)


def plan(manifest: Manifest, target: int = 0) -> list[Range]:
    """Return ranges that have every byte of every tensor once, in execution order.

    A range ends as soon as it has `target` bytes; 0 chooses the target by the model's size.
    """
    target = target or min(LARGEST, max(SMALLEST, manifest.nbytes // _SPREAD))
    found: list[Range] = []
    pieces: list[Piece] = []
    file = start = end = 0

    def close() -> None:
        if pieces:
            found.append(Range(file, start, end - start, tuple(pieces)))
            pieces.clear()

    for number, ((segment, _, _), reads) in enumerate(zip(manifest.chunks(), manifests.reads(manifest), strict=True)):
        for read in reads:
            if pieces and (read.file != file or read.file_offset != end or end - start >= target):
                close()
            if not pieces:
                file, start = read.file, read.file_offset
            pieces.append(Piece(number, segment, read.offset, read.size))
            end = read.file_offset + read.size
    close()
    return found


def only(plan: Iterable[Range], chunks: Collection[int]) -> list[Range]:
    """Return the part of the plan that fills these chunks, a range for each piece."""
    found = []
    for wanted in plan:
        start = wanted.start
        for piece in wanted.pieces:
            if piece.chunk in chunks:
                found.append(Range(wanted.file, start, piece.size, (piece,)))
            start += piece.size
    return found
