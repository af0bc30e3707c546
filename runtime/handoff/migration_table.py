"""The table of a migration: which action follows which event; and whether keys and values travel. Pure.

A kept request is transferred by a compare-and-set on its fencing epoch. A failure before the transfer resumes the
request here. A failure after the transfer takes the request back by the same step or, where the store does not say who
owns the request, ends it on both sides with an error after which the client can resume. No other worker can claim a
request that is not kept, so the connection alone decides.

    state        event     next         actions
    ───────────  ────────  ───────────  ──────────────────────
    new          begin     freezing     freeze
    freezing     frozen    offered      offer
    freezing     unfit     back         resume
    offered      refused   back         resume
    offered      broken    back         drop, resume
    offered      ready     committing   commit
    committing   yes       committed    go
    committing   no        lost         drop, lose
    committing   unknown   lost         drop, lose
    committed    running   moved        attach
    committed    broken    reclaiming   drop, reclaim
    reclaiming   yes       back         resume
    reclaiming   no        lost         lose
    reclaiming   unknown   lost         lose
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class MigrationEvent(Enum):
    """Events of a migration."""

    BEGIN = "begin"
    FROZEN = "frozen"  # the request makes no steps here any more
    UNFIT = "unfit"  # the request is ending, or another worker owns it already
    READY = "ready"  # the destination has the whole request, and its engine has begun
    REFUSED = "refused"
    BROKEN = "broken"  # the destination is gone, or late
    YES = "yes"  # the store's answer: transferred, refused, or none in time
    NO = "no"
    UNKNOWN = "unknown"
    RUNNING = "running"  # the destination sends its tokens


class MigrationAction(Enum):
    """Actions of a migration."""

    FREEZE = "freeze"  # stop the request's generations between two steps
    OFFER = "offer"  # send the request's state to the destination
    COMMIT = "commit"  # transfer the request to the destination, by compare-and-set
    GO = "go"  # let the destination send its tokens
    ATTACH = "attach"  # continue the request's streams with the destination's tokens
    RECLAIM = "reclaim"  # transfer the request back, by compare-and-set
    DROP = "drop"  # make the destination forget the request
    RESUME = "resume"  # continue the request here
    LOSE = "lose"  # end the request with an error after which the client can resume


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state, and the actions on the way there."""

    next: str
    actions: tuple[MigrationAction, ...] = ()


FINAL = {"moved", "back", "lost"}
_BACK = Transition("back", (MigrationAction.DROP, MigrationAction.RESUME))
_LOST = Transition("lost", (MigrationAction.DROP, MigrationAction.LOSE))

TABLE: dict[tuple[str, MigrationEvent], Transition] = {
    ("new", MigrationEvent.BEGIN): Transition("freezing", (MigrationAction.FREEZE,)),
    ("freezing", MigrationEvent.FROZEN): Transition("offered", (MigrationAction.OFFER,)),
    ("freezing", MigrationEvent.UNFIT): Transition("back", (MigrationAction.RESUME,)),
    ("offered", MigrationEvent.REFUSED): Transition("back", (MigrationAction.RESUME,)),
    ("offered", MigrationEvent.BROKEN): _BACK,
    ("offered", MigrationEvent.READY): Transition("committing", (MigrationAction.COMMIT,)),
    ("committing", MigrationEvent.YES): Transition("committed", (MigrationAction.GO,)),
    ("committing", MigrationEvent.NO): _LOST,
    ("committing", MigrationEvent.UNKNOWN): _LOST,
    ("committed", MigrationEvent.RUNNING): Transition("moved", (MigrationAction.ATTACH,)),
    ("committed", MigrationEvent.BROKEN): Transition("reclaiming", (MigrationAction.DROP, MigrationAction.RECLAIM)),
    ("reclaiming", MigrationEvent.YES): Transition("back", (MigrationAction.RESUME,)),
    ("reclaiming", MigrationEvent.NO): Transition("lost", (MigrationAction.LOSE,)),
    ("reclaiming", MigrationEvent.UNKNOWN): Transition("lost", (MigrationAction.LOSE,)),
}


class MigrationState:
    """The state of one migration. `handle` takes the outcome of the last action, and returns the next ones."""

    def __init__(self) -> None:
        self.state = "new"

    @property
    def over(self) -> bool:
        return self.state in FINAL

    def handle(self, event: MigrationEvent) -> Sequence[MigrationAction]:
        """Return the next actions, in order. Raises `KeyError` for an event that cannot come in this state."""
        transition = TABLE[self.state, event]
        self.state = transition.next
        return transition.actions


def as_text() -> str:
    """Return the table as the text in this module's docstring."""
    return "\n".join(
        f"{state:<11}  {event.value:<8}  {step.next:<11}  {', '.join(a.value for a in step.actions)}".rstrip()
        for (state, event), step in TABLE.items()
    )


def travels(size: int, link: float, again: float, *, exact: bool) -> bool:
    """Return whether the rows of keys and values travel, or the destination computes them again.

    `size` bytes of rows at `link` bytes per second stand against `again` seconds of computing them; 0 of either means
    not known. Rows of an `exact` request always travel: in bfloat16, rows that are computed again differ.
    """
    if exact or not again or not link:
        return True
    return size / link <= again
