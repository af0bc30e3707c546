"""The table of a migration: every order of events ends a request once, and on one side only."""

from __future__ import annotations

import random

import pytest

from runtime.handoff import migration_table
from runtime.handoff.migration_table import FINAL, TABLE, MigrationAction, MigrationEvent, MigrationState, travels

ANSWERS = {
    "new": (MigrationEvent.BEGIN,),
    "freezing": (MigrationEvent.FROZEN, MigrationEvent.UNFIT),
    "offered": (MigrationEvent.READY, MigrationEvent.REFUSED, MigrationEvent.BROKEN),
    "committing": (MigrationEvent.YES, MigrationEvent.NO, MigrationEvent.UNKNOWN),
    "committed": (MigrationEvent.RUNNING, MigrationEvent.BROKEN),
    "reclaiming": (MigrationEvent.YES, MigrationEvent.NO, MigrationEvent.UNKNOWN),
}


def test_the_table_is_drawn_in_its_module() -> None:
    table = (migration_table.__doc__ or "").replace("\n    ", "\n")
    assert migration_table.as_text() in table


def test_every_event_that_can_come_has_its_row() -> None:
    assert {(state, event) for state, events in ANSWERS.items() for event in events} == set(TABLE)
    assert {step.next for step in TABLE.values()} <= {*ANSWERS, *FINAL}


@pytest.mark.parametrize("seed", range(200))
def test_one_side_has_it_in_the_end(seed: int) -> None:
    chance, tested = random.Random(seed), MigrationState()
    done: list[MigrationAction] = []
    events: list[MigrationEvent] = []
    while not tested.over:
        events.append(chance.choice(ANSWERS[tested.state]))
        done += tested.handle(events[-1])
    resumed, attached, lost = (
        done.count(action) for action in (MigrationAction.RESUME, MigrationAction.ATTACH, MigrationAction.LOSE)
    )
    assert resumed + attached + lost == 1
    assert {"back": resumed, "moved": attached, "lost": lost}[tested.state] == 1
    if attached:
        assert done.index(MigrationAction.COMMIT) < done.index(MigrationAction.GO) < done.index(MigrationAction.ATTACH)
    if MigrationAction.GO in done and resumed:  # the destination may run it: only RECLAIM makes it ours again
        assert done.index(MigrationAction.RECLAIM) < done.index(MigrationAction.RESUME)
        assert events[-1] is MigrationEvent.YES
    if MigrationAction.OFFER in done and not attached and MigrationEvent.REFUSED not in events:
        assert MigrationAction.DROP in done


def test_an_event_out_of_turn_is_a_fault() -> None:
    with pytest.raises(KeyError):
        MigrationState().handle(MigrationEvent.RUNNING)


def test_rows_travel_where_that_is_quicker_or_exactness_was_asked_for() -> None:
    assert travels(100, 10.0, 11.0, exact=False)
    assert not travels(100, 10.0, 9.0, exact=False)
    assert travels(100, 10.0, 9.0, exact=True)
    assert travels(100, 10.0, 0.0, exact=False), "not known: rows are never wrong"
    assert travels(100, 0.0, 9.0, exact=False)
