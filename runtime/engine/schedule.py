"""Decides what each step feeds to the model: which rows, how many tokens of each, in which forward passes. Pure.

    rows ──► plan ──► [Forward(exact decode), Forward(exact prompt), …, Forward(everything else)]

A row decodes (one token) or prefills (a piece of its prompt). Decoding rows are in every step, so a long prompt delays
them by no more than `chunk` prompt tokens take. Half of the `chunk` tokens go to the oldest prompt, which therefore
always advances; the rest go to the shortest prompts, which are soon done.

The forward passes of deterministic rows always have the same shape: decoding is padded to a fixed number of rows (free
places are lent to other decoding rows), and each piece of a prompt, cut at multiples of `chunk`, is a forward pass of
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """The tokens that one row still has to be fed.

    The row has `known` tokens, and the model has seen `fed` of them. The first `prompt` tokens may be fed in pieces of
    any size, the others only one by one, unless the row is `batchable`. An `exact` row is deterministic.
    """

    prompt: int
    known: int
    fed: int
    exact: bool = False
    batchable: bool = False

    @property
    def piece(self) -> int:
        """The number of tokens that may be fed at once; 0 for a row that decodes."""
        end = self.known if self.batchable else self.prompt
        left = end - self.fed
        return 0 if left <= 0 or (left == 1 and self.fed >= self.prompt) else left


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass: (row, tokens) pieces, those of one token first, then `padding` rows of nothing.

    A `fixed` pass has always the same shape.
    """

    pieces: tuple[tuple[int, int], ...]
    padding: int = 0
    fixed: bool = False


def plan(needs: Sequence[Need], chunk: int, fixed: int) -> list[Forward]:
    """Return the forward passes of a step: at most `chunk` prompt tokens, deterministic decoding in `fixed` rows."""
    decoding = [i for i, need in enumerate(needs) if not need.piece]
    exact = [i for i in decoding if needs[i].exact]
    others = [i for i in decoding if not needs[i].exact]
    forwards = []
    while exact:
        lent = max(0, fixed - len(exact))
        group, exact = exact[:fixed] + others[:lent], exact[fixed:]
        others = others[lent:]
        forwards.append(Forward(tuple((i, 1) for i in group), fixed - len(group), True))
    prompts = [i for i, need in enumerate(needs) if need.piece]
    forwards += [Forward((piece,)) for piece in _alone([i for i in prompts if needs[i].exact], needs, chunk)]
    shares = _share([i for i in prompts if not needs[i].exact], needs, max(1, chunk - len(others)))
    pieces = [(i, 1) for i in others] + sorted(shares.items(), key=lambda share: share[1] > 1)
    if pieces:
        forwards.append(Forward(tuple(pieces)))
    return forwards


def _alone(rows: Sequence[int], needs: Sequence[Need], chunk: int) -> list[tuple[int, int]]:
    """Return pieces of deterministic prompts: of the oldest and the shortest, and of more as long as all the pieces
    together have at most `chunk` tokens."""
    pieces: list[tuple[int, int]] = []
    spent = 0
    for place, i in enumerate([*rows[:1], *sorted(rows[1:], key=lambda i: needs[i].piece)]):
        count = min(needs[i].piece, chunk - needs[i].fed % chunk)
        if place < 2 or spent + count <= chunk:
            pieces.append((i, count))
            spent += count
    return pieces


def _share(rows: Sequence[int], needs: Sequence[Need], budget: int) -> dict[int, int]:
    """Return how many of the `budget` tokens each row is fed; rows that are fed none are left out."""
    shares: dict[int, int] = {}
    if rows:
        shares[rows[0]] = min(needs[rows[0]].piece, -(-budget // 2))
        budget -= shares[rows[0]]
    for i in sorted(rows, key=lambda i: needs[i].piece - shares.get(i, 0)):
        more = min(budget, needs[i].piece - shares.get(i, 0))
        if more > 0:
            shares[i] = shares.get(i, 0) + more
            budget -= more
    return shares
