"""Decides how one request changes hands, and how its state travels. Pure: events in, actions out, no I/O, no clock.

A request that is kept is made over by a compare-and-set on its fencing epoch; until that is done nothing has happened,
and any failure resumes it here. Afterwards it is taken back the same way, or, where nobody can say whose it is, given
up on both sides with an error after which it can be resumed. A request that is not kept can be claimed by nobody, so
the connection alone decides: what cannot be heard any more does not count.

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
    BEGIN = "begin"
    FROZEN = "frozen"  # no step of it is made here any more
    UNFIT = "unfit"  # it ends just now, or is another's already
    READY = "ready"  # the destination has all of it, and works on it in silence
    REFUSED = "refused"
    BROKEN = "broken"  # nothing more comes from the destination, or not in time
    YES = "yes"  # the store's answer
    NO = "no"
    UNKNOWN = "unknown"
    RUNNING = "running"  # the destination tells its tokens


class MigrationAction(Enum):
    FREEZE = "freeze"
    OFFER = "offer"  # its state goes to the destination
    COMMIT = "commit"  # compare and set: ours, now the destination's
    GO = "go"  # the destination may tell what it makes
    ATTACH = "attach"  # its stream goes on with the destination's tokens
    RECLAIM = "reclaim"  # compare and set: the destination's, ours again
    DROP = "drop"  # the destination forgets it
    RESUME = "resume"  # it goes on here
    LOSE = "lose"  # it ends with an error after which it can be resumed


@dataclass(frozen=True, slots=True)
class Transition:
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
    """One request's. Who carries its actions out tells what came of them."""

    def __init__(self) -> None:
        self.state = "new"

    @property
    def over(self) -> bool:
        return self.state in FINAL

    def handle(self, event: MigrationEvent) -> Sequence[MigrationAction]:
        """What is to be done now, in order. Raises `KeyError` for an event that cannot come in this state."""
        transition = TABLE[self.state, event]
        self.state = transition.next
        return transition.actions


def drawn() -> str:
    """The table, as text."""
    return "\n".join(
        f"{state:<11}  {event.value:<8}  {step.next:<11}  {', '.join(a.value for a in step.actions)}".rstrip()
        for (state, event), step in TABLE.items()
    )


def travels(size: int, link: float, again: float, *, exact: bool) -> bool:
    """Whether the rows travel, and are not made anew by the destination.

    `size` bytes of rows at `link` bytes per second, against `again` seconds for feeding all tokens once more; 0 of
    either is not known. Where exactness was asked for they always do: in bfloat16 rows that are made anew differ.
    """
    if exact or not again or not link:
        return True
    return size / link <= again
