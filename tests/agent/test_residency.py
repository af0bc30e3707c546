"""The residency state machine: each transition by itself, and all of them against a naive driver."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from cache_agent.errors import (
    EvictRefused,
    ModelNotFound,
    NoCapacity,
    OriginUnavailable,
    WrongRevision,
)
from cache_agent.model.manifest import Manifest
from cache_agent.policy.eviction import Candidate, cheapest, priority
from cache_agent.residency import events
from cache_agent.residency.events import (
    Admit,
    Admitted,
    Adopt,
    Announce,
    Complete,
    Evict,
    EvictAsked,
    EvictDone,
    Evicted,
    Grant,
    LeaseAsked,
    LeaseClosed,
    Load,
    Loaded,
    LoadFailed,
    OfferAsked,
    Offered,
    OfferFailed,
    Orphan,
    PinAsked,
    PinDone,
    Refuse,
    Reserved,
    Resolve,
    Resolved,
    ResolveFailed,
)
from cache_agent.residency.machine import Residency

A, B = "s3://m/a", "s3://m/b"
REV, OTHER = "rev-1", "rev-2"


def plan(source: str, size: int = 100) -> Manifest:
    return Manifest(source=source, tensors=(), segments=(size,), weight_files=(), files={})


class Machine:
    """A residency and a clock that the test turns."""

    def __init__(self, capacity: int = 250, revalidate_after: float = 10.0) -> None:
        self.residency = Residency(capacity, revalidate_after)
        self.now = 0.0
        self.leases = iter(range(1, 1000))

    def __call__(self, *happened: events.Event) -> list[events.Action]:
        """The actions of the last event."""
        actions: list[events.Action] = []
        for event in happened:
            actions = self.residency.handle(event, self.now)
        return actions

    def ask(self, uri: str, revision: str = "") -> tuple[int, list[events.Action]]:
        lease = next(self.leases)
        return lease, self(LeaseAsked(lease, uri, revision))

    def resident(self, uri: str, source: str = "", revision: str = "", size: int = 100) -> int:
        """Brings a model in and closes the lease that did; the entry."""
        lease, _ = self.ask(uri)
        loads = [action for action in self(Resolved(uri, plan(source or uri, size))) if isinstance(action, Load)]
        entry = loads[0].entry
        self(Reserved(entry), Loaded(entry))
        if revision:
            self(Admitted(entry, revision))
        self(LeaseClosed(lease))
        return entry


@pytest.fixture
def machine():
    return Machine()


# --- one lease --------------------------------------------------------------------------------------------------------


def test_the_life_of_one_lease(machine):
    lease, actions = machine.ask(A)
    assert actions == [Resolve(A)]
    assert machine(Resolved(A, plan("src"))) == [Load(1, plan("src"), A)]
    assert machine(Reserved(1)) == [Grant(lease, 1)]
    assert machine(Loaded(1)) == [Complete(lease, 1, False, ""), Admit(1)]
    assert machine(Admitted(1, REV)) == [Announce(lease, REV)]
    assert machine(LeaseClosed(lease)) == []
    assert machine.residency.used == 100, "it stays for the next function"


def test_a_resident_model_is_granted_and_complete_at_once(machine):
    machine.resident(A, revision=REV)
    lease, actions = machine.ask(A)
    assert actions == [Grant(lease, 1), Complete(lease, 1, True, REV)]


def test_a_resident_model_before_its_admission_is_complete_and_announced_later(machine):
    machine.resident(A)
    lease, actions = machine.ask(A)
    assert actions == [Grant(lease, 1), Complete(lease, 1, True, "")]
    assert machine(Admitted(1, REV)) == [Announce(lease, REV)]


def test_who_asks_while_it_loads_joins(machine):
    first, _ = machine.ask(A)
    second, actions = machine.ask(A)
    assert actions == [], "one resolution serves both"
    assert machine(Resolved(A, plan("src"))) == [Load(1, plan("src"), A)]
    third, actions = machine.ask(A)
    assert actions == [], "nothing to grant before memory is reserved"
    assert machine(Reserved(1)) == [Grant(first, 1), Grant(second, 1), Grant(third, 1)]
    fourth, actions = machine.ask(A)
    assert actions == [Grant(fourth, 1)]
    completes = [Complete(lease, 1, False, "") for lease in (first, second, third, fourth)]
    assert machine(Loaded(1)) == [*completes, Admit(1)]


def test_a_failed_resolution_reaches_all_who_wait_and_is_tried_again_by_the_next(machine):
    first, _ = machine.ask(A)
    second, _ = machine.ask(A)
    error = OriginUnavailable("down")
    assert machine(ResolveFailed(A, error)) == [Refuse(first, error), Refuse(second, error)]
    assert machine.ask(A)[1] == [Resolve(A)]


@pytest.mark.parametrize("reserved", [False, True])
def test_a_failed_load_reaches_all_its_leases_and_gives_the_room_back(machine, reserved):
    leases = [machine.ask(A)[0] for _ in range(3)]
    machine(Resolved(A, plan("src", 250)))
    if reserved:
        machine(Reserved(1))
    error = OriginUnavailable("broke off")
    assert machine(LoadFailed(1, error)) == [Refuse(lease, error) for lease in leases]
    assert machine.residency.used == 0
    _, actions = machine.ask(A)
    assert actions == [Resolve(A)]
    assert machine(Resolved(A, plan("src", 250))) == [Load(2, plan("src", 250), A)]


def test_a_lease_closed_while_resolving_hears_nothing_and_loads_nothing(machine):
    lease, _ = machine.ask(A)
    machine(LeaseClosed(lease))
    assert machine(Resolved(A, plan("src"))) == []
    assert machine.residency.used == 0


def test_a_lease_closed_while_loading_lets_the_load_go_on_for_the_next(machine):
    lease, _ = machine.ask(A)
    machine(Resolved(A, plan("src")), Reserved(1), LeaseClosed(lease))
    assert machine(Loaded(1)) == [Admit(1)]
    second, actions = machine.ask(A)
    assert actions == [Grant(second, 1), Complete(second, 1, True, "")]


def test_closing_an_unknown_lease_changes_nothing(machine):
    assert machine(LeaseClosed(77)) == []


# --- revalidation -----------------------------------------------------------------------------------------------------


def test_an_old_alias_is_checked_once_in_the_background(machine):
    machine.resident(A)
    machine.now = 10.0
    assert Resolve(A) not in machine.ask(A)[1], "not older than the limit yet"
    machine.now = 10.1
    first, actions = machine.ask(A)
    assert actions == [Grant(first, 1), Complete(first, 1, True, ""), Resolve(A)]
    assert Resolve(A) not in machine.ask(A)[1], "one check at a time"
    assert machine(Resolved(A, plan(A))) == []
    assert Resolve(A) not in machine.ask(A)[1]


def test_a_changed_source_gives_new_leases_new_bytes_and_leaves_old_ones_alone(machine):
    machine.resident(A, "old")
    machine.now = 11.0
    old, _ = machine.ask(A)
    assert machine(Resolved(A, plan("new"))) == [], "nobody waits for the new bytes yet"
    new, actions = machine.ask(A)
    assert actions == [Resolve(A)]
    assert machine(Resolved(A, plan("new"))) == [Load(2, plan("new"), A)]
    assert machine(Reserved(2)) == [Grant(new, 2)]
    assert machine.residency.entries[1].leases == {old: ""}


def test_an_origin_out_of_reach_does_not_take_resident_bytes_away(machine):
    machine.resident(A)
    machine.now = 11.0
    machine.ask(A)
    assert machine(ResolveFailed(A, OriginUnavailable("down"))) == []
    lease, actions = machine.ask(A)
    assert actions == [Grant(lease, 1), Complete(lease, 1, True, ""), Resolve(A)]


# --- pins -------------------------------------------------------------------------------------------------------------


def test_a_pinned_lease_is_complete_only_after_the_digest_proves_it(machine):
    lease, _ = machine.ask(A, REV)
    machine(Resolved(A, plan("src")))
    assert machine(Reserved(1)) == [Grant(lease, 1)]
    assert machine(Loaded(1)) == [Admit(1)]
    assert machine(Admitted(1, REV)) == [Complete(lease, 1, False, REV)]


def test_a_pin_on_resident_bytes_whose_digest_is_not_known_waits_for_it(machine):
    machine.resident(A)
    lease, _ = machine.ask(A, REV)
    assert machine(Resolved(A, plan(A))) == [Grant(lease, 1)]
    assert machine(Admitted(1, REV)) == [Complete(lease, 1, False, REV)]


def test_a_pin_that_does_not_match_is_refused_and_other_leases_go_on(machine):
    pinned, _ = machine.ask(A, OTHER)
    free, _ = machine.ask(A)
    machine(Resolved(A, plan("src")), Reserved(1), Loaded(1))
    announce, refuse = sorted(machine(Admitted(1, REV)), key=lambda action: type(action).__name__)
    assert announce == Announce(free, REV)
    assert (refuse.lease, type(refuse.error)) == (pinned, WrongRevision)
    assert machine.residency.entries[1].leases == {free: ""}


def test_a_pin_finds_its_revision_without_asking_the_origin_where_it_was_read_from(machine):
    machine.resident(A, revision=REV)
    lease, actions = machine.ask(A, REV)
    assert actions == [Grant(lease, 1), Complete(lease, 1, True, REV)]


def test_a_pin_finds_bytes_that_its_uri_had_before(machine):
    machine.resident(A, "old", revision=REV)
    holder, _ = machine.ask(A)
    machine.now = 11.0
    machine.ask(A)
    machine(Resolved(A, plan("new")))
    lease, actions = machine.ask(A, REV)
    assert actions == [Grant(lease, 1), Complete(lease, 1, True, REV)]
    assert holder in machine.residency.entries[1].leases


def test_a_known_revision_is_not_had_under_another_uri_before_its_origin_says_so(machine):
    """Or whoever may have one place could have the bytes of every other, by their revision."""
    machine.resident(A, revision=REV)
    lease, actions = machine.ask(B, REV)
    assert actions == [Resolve(B)]
    assert machine(Resolved(B, plan("src-b"), REV)) == [Grant(lease, 1), Complete(lease, 1, True, REV)]
    assert len(machine.residency.entries) == 1, "and then there is no second copy"
    again, actions = machine.ask(B, REV)
    assert actions == [Grant(again, 1), Complete(again, 1, True, REV)]


def test_another_place_with_other_bytes_does_not_give_the_revision(machine):
    machine.resident(A, revision=REV)
    lease, _ = machine.ask(B, REV)
    machine(Resolved(B, plan("src-b")))
    machine(Reserved(2), Loaded(2))
    (refuse, *_) = machine(Admitted(2, OTHER))
    assert (refuse.lease, type(refuse.error)) == (lease, WrongRevision)
    assert A not in refuse.error.text


def test_a_pin_on_bytes_known_to_be_others_is_refused_without_a_load(machine):
    machine.resident(A, "src", revision=REV)
    lease, actions = machine.ask(A, OTHER)
    assert actions == [Resolve(A)], "the origin may have it by now"
    (refuse,) = machine(Resolved(A, plan("src"), REV))
    assert (refuse.lease, type(refuse.error)) == (lease, WrongRevision)


def test_a_pin_on_a_revision_admitted_before_is_complete_with_the_load(machine):
    lease, _ = machine.ask(A, REV)
    machine(Resolved(A, plan("src"), REV), Reserved(1))
    assert machine(Loaded(1)) == [Complete(lease, 1, False, REV)], "no second digest"


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_equal_bytes_under_two_uris_collapse_when_nobody_holds_the_second(machine):
    machine.resident(A, "a", revision=REV)
    machine.resident(B, "b")
    (evict,) = machine(Admitted(2, REV))
    assert (type(evict), evict.entry) == (Evict, 2)
    machine(Evicted(2))
    lease, actions = machine.ask(B)
    assert actions == [Grant(lease, 1), Complete(lease, 1, True, REV)]


def test_equal_bytes_collapse_once_the_last_holder_leaves(machine):
    machine.resident(A, "a", revision=REV)
    holder, _ = machine.ask(B)
    machine(Resolved(B, plan("b")), Reserved(2), Loaded(2))
    assert machine(Admitted(2, REV)) == [Announce(holder, REV)]
    newcomer, actions = machine.ask(B)
    assert actions[0] == Grant(newcomer, 1), "new leases share the first copy already"
    (evict,) = machine(LeaseClosed(holder))
    assert (type(evict), evict.entry) == (Evict, 2)


def test_a_source_known_to_be_a_resident_revision_is_not_loaded_again(machine):
    machine.resident(A, "a", revision=REV)
    lease, _ = machine.ask(B)
    assert machine(Resolved(B, plan("b"), REV)) == [Grant(lease, 1), Complete(lease, 1, True, REV)]


def test_when_the_first_copy_goes_the_second_takes_its_place(machine):
    """The second copy is held; evicting the first must not hide it from later leases."""
    machine.resident(A, "a", revision=REV)
    machine.ask(B)
    machine(Resolved(B, plan("b")), Reserved(2), Loaded(2), Admitted(2, REV))
    actions = machine(EvictAsked(50, A))
    assert [type(action) for action in actions] == [Evict, EvictDone]
    machine(Evicted(1))
    again, actions = machine.ask(B)
    assert actions == [Grant(again, 2), Complete(again, 2, True, REV)]
    pinned, actions = machine.ask(A, REV)
    assert actions == [Grant(pinned, 2), Complete(pinned, 2, True, REV)]


# --- room -------------------------------------------------------------------------------------------------------------


def test_the_least_used_idle_model_makes_room(machine):
    for number, uri in enumerate((A, B)):
        machine.now = float(number)
        machine.resident(uri)
    machine.now = 2.0
    machine(LeaseClosed(machine.ask(A)[0]))
    lease, _ = machine.ask("s3://m/c")
    evict, load = machine(Resolved("s3://m/c", plan("c")))
    assert (type(evict), evict.entry) == (Evict, 2), "B was used less"
    assert load == Load(3, plan("c"), "s3://m/c")
    assert machine(Evicted(2)) == []
    assert machine(Reserved(3)) == [Grant(lease, 3)]


def test_a_model_counts_as_used_until_its_last_lease_ends(machine):
    held = machine.ask(A)[0]
    machine(Resolved(A, plan(A)), Reserved(1), Loaded(1))
    machine.now = 1.0
    machine.resident(B)
    machine.now = 2.0
    machine(LeaseClosed(held))
    machine.ask("s3://m/c")
    assert machine(Resolved("s3://m/c", plan("c")))[0].entry == 2


def test_leased_models_are_never_evicted(machine):
    machine.resident(A, size=250)
    machine.ask(A)
    lease, _ = machine.ask(B)
    (refuse,) = machine(Resolved(B, plan("b")))
    assert (refuse.lease, type(refuse.error)) == (lease, NoCapacity)
    assert machine.residency.used == 250


def test_loading_models_are_never_evicted(machine):
    machine.ask(A)
    machine(Resolved(A, plan("a", 250)))
    lease, _ = machine.ask(B)
    (refuse,) = machine(Resolved(B, plan("b")))
    assert (refuse.lease, type(refuse.error)) == (lease, NoCapacity)


def test_a_model_larger_than_the_budget_is_refused_with_sizes_and_evicts_nothing(machine):
    machine.resident(A)
    leases = [machine.ask(B)[0] for _ in range(2)]
    refusals = machine(Resolved(B, plan("b", 300_000_000)))
    assert [refuse.lease for refuse in refusals] == leases
    assert "needs 300 MB" in refusals[0].error.text
    assert machine.residency.entries[1].state == "ready"


def test_memory_of_an_evicting_model_counts_as_used_until_it_is_gone(machine):
    machine.resident(A, size=250)
    machine.ask(B)
    machine(Resolved(B, plan("b", 250)))
    assert machine.residency.used == 500
    machine(Evicted(1))
    assert machine.residency.used == 250


def test_news_of_an_evicted_copy_is_ignored(machine):
    machine.resident(A)
    machine(EvictAsked(50, A))
    assert machine(Admitted(1, REV)) == []
    machine(Evicted(1))
    assert machine(Admitted(1, REV)) == []
    lease, _ = machine.ask(B, REV)
    assert machine(Resolved(B, plan("b")))[0] == Load(2, plan("b"), B), "nothing is known of that revision"
    assert lease


# --- evicting on request ----------------------------------------------------------------------------------------------


def test_an_idle_model_is_evicted_when_asked(machine):
    machine.resident(A)
    evict, done = machine(EvictAsked(50, A))
    assert (type(evict), evict.entry, done) == (Evict, 1, EvictDone(50, 100))
    assert machine.ask(A)[1] == [Resolve(A)], "no later lease finds it"


@pytest.mark.parametrize("state", ["leased", "loading", "absent"])
def test_what_cannot_be_evicted_is_refused_by_name(machine, state):
    if state != "absent":
        machine.ask(A)
        machine(Resolved(A, plan("a")))
    if state == "leased":
        machine(Reserved(1), Loaded(1))
    (refuse,) = machine(EvictAsked(50, A))
    assert refuse.lease == 50
    assert type(refuse.error) is (ModelNotFound if state == "absent" else EvictRefused)
    assert A in refuse.error.text


# --- pins of models, and prices ---------------------------------------------------------------------------------------


def test_a_pinned_model_is_not_evicted_until_it_is_unpinned(machine):
    machine.resident(A)
    machine.resident(B)
    assert machine(PinAsked(60, A, True)) == [PinDone(60, 100)]
    (refuse,) = machine(EvictAsked(50, A))
    assert (type(refuse.error), "pinned" in refuse.error.text) == (EvictRefused, True)
    machine.ask("s3://m/c")
    evict, _ = machine(Resolved("s3://m/c", plan("c")))
    assert evict.entry == 2, "A is older, and pinned"
    assert machine(PinAsked(61, A, False)) == [PinDone(61, 100)]
    assert type(machine(EvictAsked(51, A))[0]) is Evict


@pytest.mark.parametrize("pinned", [True, False])
def test_what_is_not_resident_cannot_be_pinned(machine, pinned):
    (refuse,) = machine(PinAsked(60, A, pinned))
    assert type(refuse.error) is ModelNotFound
    assert "prefetch" in refuse.error.text
    assert not machine.residency._accounts.pins


def test_a_pin_follows_the_uri_to_new_bytes(machine):
    machine.resident(A, "old")
    machine(PinAsked(60, A, True))
    machine.now = 11.0
    machine(LeaseClosed(machine.ask(A)[0]), Resolved(A, plan("new")))
    lease, _ = machine.ask(A)
    machine(Resolved(A, plan("new")), Reserved(2), Loaded(2), LeaseClosed(lease))
    assert machine.residency.pinned == {"new"}
    machine.ask(B)
    assert machine(Resolved(B, plan("b")))[0].entry == 1


def test_the_model_that_is_cheapest_to_bring_back_goes_first(machine):
    for uri, seconds in ((A, 9.0), (B, 2.0)):
        lease, _ = machine.ask(uri)
        entry = machine(Resolved(uri, plan(uri)))[0].entry
        machine(Reserved(entry), Loaded(entry, seconds), LeaseClosed(lease))
        machine.now += 1
    machine.ask("s3://m/c")
    evict, _ = machine(Resolved("s3://m/c", plan("c")))
    assert evict.entry == 2, "although it was used last"
    assert "smallest price" in evict.why


def test_what_was_dear_and_is_not_used_any_more_goes_in_the_end(machine):
    """The clock rises with every eviction; without it a model that was dear once would stay for ever."""
    lease, _ = machine.ask(A)
    machine(Resolved(A, plan(A)), Reserved(1), Loaded(1, 5.0), LeaseClosed(lease))
    for number in range(12):
        uri = f"s3://m/{number}"
        lease, _ = machine.ask(uri)
        actions = machine(Resolved(uri, plan(uri)))
        entry = next(action.entry for action in actions if isinstance(action, Load))
        for action in actions:
            if isinstance(action, Evict):
                machine(Evicted(action.entry))
        machine(Reserved(entry), Loaded(entry, 1.0), LeaseClosed(lease))
    assert 1 not in machine.residency.entries


def test_priority_is_that_of_the_paper():
    assert priority(5.0, 3, 2.0, 4) == 5.0 + 3 * 2.0 / 4


def test_no_capacity_says_who_holds_what(machine):
    machine.residency.capacity = 300_000_000
    for number, uri in enumerate((A, B, "s3://m/c")):
        lease, _ = machine.ask(uri)
        machine(Resolved(uri, plan(uri, 100_000_000)), Reserved(number + 1))
        if number < 2:
            machine(Loaded(number + 1))
        if number == 1:
            machine(LeaseClosed(lease), PinAsked(60, B, True))
    machine.ask("s3://m/d")
    (refuse,) = machine(Resolved("s3://m/d", plan("d", 100_000_000)))
    for part in (f"{A} 100 MB, held by a function", f"{B} 100 MB, pinned", "s3://m/c 100 MB, held by"):
        assert part in refuse.error.text


def test_no_capacity_names_the_largest_and_counts_the_rest():
    machine = Machine(capacity=10_000_000)
    for number in range(9):
        uri = f"s3://{'long' * 400}/{number}"
        machine.ask(uri)
        machine(Resolved(uri, plan(uri, 1_000_000)), Reserved(number + 1), Loaded(number + 1))
    machine.ask(A)
    (refuse,) = machine(Resolved(A, plan("a", 5_000_000)))
    assert "and 4 more" in refuse.error.text
    assert len(refuse.error.text) < 1500


# --- offers -----------------------------------------------------------------------------------------------------------


def test_offered_bytes_become_an_entry_that_the_offering_lease_holds(machine):
    assert machine(OfferAsked(70, A)) == []
    assert machine(Offered(70, A, plan(A), REV)) == [Adopt(70, 1, True)]
    lease, actions = machine.ask(A)
    assert actions == [Grant(lease, 1), Complete(lease, 1, True, REV)]
    (refuse,) = machine(EvictAsked(50, A))
    assert type(refuse.error) is EvictRefused
    machine(LeaseClosed(70), LeaseClosed(lease))
    assert type(machine(EvictAsked(50, A))[0]) is Evict


def test_the_same_memory_offered_twice_is_one_entry(machine):
    machine(OfferAsked(70, A), OfferAsked(71, A), Offered(70, A, plan(A), REV))
    assert machine(Offered(71, A, plan(A), REV, 1)) == [Adopt(71, 1, False)]
    assert set(machine.residency.entries[1].leases) == {70, 71}


def test_whoever_asks_waits_for_an_offer_and_shares_it(machine):
    machine(OfferAsked(70, A))
    lease, actions = machine.ask(A)
    assert actions == []
    actions = machine(Offered(70, A, plan(A), REV))
    assert actions == [Adopt(70, 1, True), Grant(lease, 1), Complete(lease, 1, True, REV)]


def test_when_an_offer_fails_whoever_waited_is_loaded_for(machine):
    machine(OfferAsked(70, A))
    lease, _ = machine.ask(A)
    assert machine(OfferFailed(70, A, "lies")) == [Orphan(70, A, "lies"), Resolve(A)]
    assert machine(Resolved(A, plan(A)), Reserved(1)) == [Grant(lease, 1)]


def test_a_resolution_that_ends_before_the_offer_waits_for_it(machine):
    lease, _ = machine.ask(A)
    machine(OfferAsked(70, A))
    assert machine(Resolved(A, plan(A))) == []
    actions = machine(Offered(70, A, plan(A), REV))
    assert actions == [Adopt(70, 1, True), Grant(lease, 1), Complete(lease, 1, True, REV)]


@pytest.mark.parametrize("revision", ["", REV])
def test_an_offer_beside_a_copy_of_the_agents_own_is_an_orphan(machine, revision):
    machine.resident(A, "a" if revision else B, revision=revision)
    machine(OfferAsked(70, B))
    (orphan,) = machine(Offered(70, B, plan(B), REV))
    assert (type(orphan), orphan.lease) == (Orphan, 70)
    assert len(machine.residency.entries) == 1


@pytest.mark.parametrize("proved", [True, False])
def test_an_offer_whose_function_left_meanwhile_leaves_nothing(machine, proved):
    machine(OfferAsked(70, A), LeaseClosed(70))
    assert machine(Offered(70, A, plan(A), REV) if proved else OfferFailed(70, A, "lies")) == []
    assert not machine.residency.entries
    assert not machine.residency._aliases
    assert machine.ask(A)[1] == [Resolve(A)]


def test_an_origin_that_fails_while_an_offer_is_examined(machine):
    lease, _ = machine.ask(A)
    machine(OfferAsked(70, A))
    error = OriginUnavailable("down")
    assert machine(ResolveFailed(A, error)) == [Refuse(lease, error)]
    assert machine(Offered(70, A, plan(A), REV)) == [Adopt(70, 1, True)]


def test_bytes_are_adopted_over_the_budget_and_make_no_room_for_others(machine):
    machine.resident(B, size=200)
    machine(OfferAsked(70, A), Offered(70, A, plan(A, 200), REV))
    assert machine.residency.used == 400
    machine.ask("s3://m/c")
    (refuse,) = machine(Resolved("s3://m/c", plan("c", 100)))
    assert type(refuse.error) is NoCapacity


# --- who holds what ---------------------------------------------------------------------------------------------------


def test_holders_of_one_model_and_of_all(machine):
    machine.resident(A)
    machine.resident(B)
    a, b = machine.ask(A)[0], machine.ask(B)[0]
    waiting, _ = machine.ask("s3://m/c")
    assert machine.residency.holders(A) == [a]
    assert sorted(machine.residency.holders()) == [a, b]
    assert machine.residency.holders("s3://m/c") == [], f"{waiting} holds nothing yet"


def test_holders_of_a_model_include_those_of_bytes_it_had_before(machine):
    """A drain by URI is how a rollout tells the functions on the old bytes to go."""
    machine.resident(A, "old")
    machine.now = 11.0
    old, _ = machine.ask(A)
    machine(Resolved(A, plan("new")))
    new, _ = machine.ask(A)
    machine(Resolved(A, plan("new")))
    assert sorted(machine.residency.holders(A)) == [old, new]


def test_nothing_is_remembered_of_uris_that_only_named_a_pin(machine):
    """Otherwise a client could fill the agent's memory with invented URIs."""
    machine.resident(A, revision=REV)
    known = len(machine.residency._aliases)
    for number in range(100):
        lease, _ = machine.ask(f"s3://m/{number}", REV)
        machine(LeaseClosed(lease))
        machine(ResolveFailed(f"s3://m/{number}", ModelNotFound("there is nothing")))
    assert not machine.residency._accounts.leases
    assert len(machine.residency._aliases) == known


# --- the policy -------------------------------------------------------------------------------------------------------


def test_a_victim_made_superfluous_by_a_larger_one_is_spared():
    old_small, large = Candidate(1, 10, 1.0), Candidate(2, 100, 2.0)
    assert cheapest([large, old_small], 5).keys == [1]
    assert cheapest([large, old_small], 50).keys == [2]
    assert cheapest([large, old_small], 110).keys == [1, 2]
    assert cheapest([large, old_small], 111) is None
    assert cheapest([], 1) is None


def test_equal_priorities_go_by_age():
    assert cheapest([Candidate(1, 10, 1.0, 5.0), Candidate(2, 10, 1.0, 4.0)], 10).keys == [2]


def test_the_clock_rises_to_what_was_evicted():
    assert cheapest([Candidate(1, 10, 3.0), Candidate(2, 10, 7.0)], 20, clock=5.0).clock == 7.0
    assert cheapest([Candidate(1, 10, 3.0)], 10, clock=5.0).clock == 5.0


# --- all together -----------------------------------------------------------------------------------------------------

URIS = [f"s3://m/{letter}" for letter in "abc"]
CONTENTS = {"small": 40, "other": 40, "medium": 90, "large": 160}
CAPACITY = 200


@dataclass
class Held:
    """What the naive driver knows of an entry: the content it was loaded with and how far it is."""

    source: str
    content: str
    state: str = "reserving"


@dataclass
class Client:
    """A lease as its client sees it."""

    uri: str
    pinned: str
    replies: list[str] = field(default_factory=list)
    entry: int = 0
    open: bool = True

    @property
    def over(self) -> bool:
        return not self.open or "refuse" in self.replies


class Driver(RuleBasedStateMachine):
    """Feeds the machine what a real driver would, in any order that can happen, and keeps its own books."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(CAPACITY, revalidate_after=10.0)
        self.now = 0.0
        self.numbers = 0
        self.content = dict.fromkeys(URIS, "small")
        self.history = {uri: {"small"} for uri in URIS}
        self.clients: dict[int, Client] = {}
        self.resolving: set[str] = set()
        self.held: dict[int, Held] = {}
        self.admitting: set[int] = set()
        self.evicting: set[int] = set()
        self.admitted: dict[str, str] = {}
        self.evictions: dict[int, str] = {}
        self.pinning: set[int] = set()
        self.beyond: set[int] = set()  # adopted entries, which may exceed the budget
        self.offers: dict[int, str] = {}  # lease -> URI, while its bytes are examined
        self.proved = ""  # the source of the offer that is being answered

    clients_asked = Bundle("clients")

    # --- carrying out what the machine decides

    def happen(self, event: events.Event) -> None:
        for action in self.residency.handle(event, self.now):
            self.carry_out(action)

    def carry_out(self, action: events.Action) -> None:
        match action:
            case Resolve(uri):
                assert uri not in self.resolving, "one resolution per URI at a time"
                self.resolving.add(uri)
            case Load(entry, manifest, uri):
                assert entry not in self.held
                twins = [n for n, h in self.held.items() if h.source == manifest.source and n not in self.evicting]
                assert not twins, "one copy of a source at a time"
                self.held[entry] = Held(manifest.source, manifest.source.rpartition("#")[2])
                assert uri == manifest.source.rpartition("#")[0]
            case Grant(lease, entry):
                client = self.reply(lease, "grant", after=[])
                client.entry = entry
                assert self.held[entry].state in ("loading", "ready")
            case Complete(lease, entry, _, revision):
                client = self.reply(lease, "complete", after=["grant"])
                held = self.held[entry]
                assert (client.entry, held.state) == (entry, "ready")
                assert revision in ("", f"rev-{held.content}")
                if client.pinned:
                    assert revision == client.pinned
                else:
                    assert held.content in self.history[client.uri]
                if not revision:
                    client.replies.append("revision open")
            case Announce(lease, revision):
                client = self.reply(lease, "announce", after=["grant", "complete", "revision open"])
                assert revision == f"rev-{self.held[client.entry].content}"
            case Refuse(lease, error) if lease in self.evictions:
                self.check_refused_eviction(self.evictions.pop(lease), error)
            case Refuse(lease, error) if lease in self.pinning:
                self.pinning.remove(lease)
                assert isinstance(error, ModelNotFound)
            case PinDone(asker, _):
                self.pinning.remove(asker)
            case Refuse(lease, error):
                client = self.clients[lease]
                assert client.open
                assert client.replies in ([], ["grant"]), "a complete lease is never refused"
                client.replies.append("refuse")
                if isinstance(error, WrongRevision):
                    assert client.pinned
                if isinstance(error, NoCapacity):
                    idle = [n for n in self.alive() if self.held[n].state == "ready" and not self.stays(n)]
                    taken = sum(self.bytes(n) for n in self.alive() if n not in idle)
                    assert CONTENTS[self.content_resolved] > CAPACITY - taken, "it would have fitted"
            case Admit(entry):
                assert self.held[entry].state == "ready"
                assert entry not in self.admitting
                self.admitting.add(entry)
            case Evict(entry, _):
                assert self.held[entry].state == "ready"
                assert not self.stays(entry), "held and pinned bytes are never evicted"
                assert entry not in self.evicting
                self.evicting.add(entry)
            case Adopt(lease, entry, fresh):
                client = self.reply(lease, "grant", after=[])
                client.replies.append("complete")
                client.entry = entry
                assert fresh == (entry not in self.held)
                if fresh:
                    twins = [n for n in self.alive() if self.held[n].source == self.proved]
                    assert not twins, "one copy of a source at a time"
                    self.held[entry] = Held(self.proved, self.proved.rpartition("#")[2], "ready")
                    self.beyond.add(entry)
            case Orphan(lease, _, _):
                self.reply(lease, "refuse", after=[])
            case EvictDone(asker, size):
                self.evictions.pop(asker)
                assert size in CONTENTS.values()
            case _:
                raise AssertionError(action)

    def reply(self, lease: int, what: str, after: list[str]) -> Client:
        client = self.clients[lease]
        assert client.open, f"{what} for a lease that was closed"
        assert client.replies == after, f"{what} after {client.replies}"
        client.replies.append(what)
        return client

    def check_refused_eviction(self, uri: str, error: Exception) -> None:
        if isinstance(error, EvictRefused):
            found = self.residency.entry_of(uri)
            assert found is not None
            assert self.stays(found.number) or self.held[found.number].state != "ready"
        else:
            assert isinstance(error, ModelNotFound)

    def alive(self) -> list[int]:
        return [number for number in self.held if number not in self.evicting]

    def leases(self, entry: int) -> list[int]:
        return list(self.residency.entries[entry].leases)

    def stays(self, entry: int) -> bool:
        return bool(self.leases(entry)) or self.residency.is_pinned(self.residency.entries[entry])

    def bytes(self, entry: int) -> int:
        return CONTENTS[self.held[entry].content]

    # --- what can happen

    @rule(target=clients_asked, uri=st.sampled_from(URIS), pin=st.sampled_from(["", "", "", *CONTENTS]))
    def ask(self, uri: str, pin: str) -> int:
        self.numbers += 1
        pinned = f"rev-{pin}" if pin else ""
        self.clients[self.numbers] = Client(uri, pinned)
        self.happen(LeaseAsked(self.numbers, uri, pinned))
        return self.numbers

    @rule(lease=consumes(clients_asked))
    def close(self, lease: int) -> None:
        self.clients[lease].open = False
        self.happen(LeaseClosed(lease))

    @precondition(lambda self: self.resolving)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        self.finish_resolving(data.draw(st.sampled_from(sorted(self.resolving))))

    def finish_resolving(self, uri: str) -> None:
        self.resolving.remove(uri)
        content = self.content_resolved = self.content[uri]
        source = f"{uri}#{content}"
        self.happen(Resolved(uri, plan(source, CONTENTS[content]), self.admitted.get(source, "")))

    @precondition(lambda self: self.resolving)
    @rule(data=st.data())
    def fail_to_resolve(self, data: st.DataObject) -> None:
        uri = data.draw(st.sampled_from(sorted(self.resolving)))
        self.resolving.remove(uri)
        self.happen(ResolveFailed(uri, OriginUnavailable("down")))

    def entries_that_are(self, *states: str) -> list[int]:
        return [number for number, held in self.held.items() if held.state in states]

    @precondition(lambda self: self.entries_that_are("reserving"))
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.entries_that_are("reserving")))
        self.held[entry].state = "loading"
        self.happen(Reserved(entry))

    @precondition(lambda self: self.entries_that_are("loading"))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.entries_that_are("loading")))
        self.held[entry].state = "ready"
        self.happen(Loaded(entry))

    @precondition(lambda self: self.entries_that_are("reserving", "loading"))
    @rule(data=st.data())
    def fail_to_load(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.entries_that_are("reserving", "loading")))
        waiting = self.leases(entry)
        self.happen(LoadFailed(entry, OriginUnavailable("broke off")))
        del self.held[entry]
        assert all(self.clients[lease].over for lease in waiting)

    @precondition(lambda self: self.admitting)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        self.finish_admitting(data.draw(st.sampled_from(sorted(self.admitting))))

    def finish_admitting(self, entry: int) -> None:
        self.admitting.remove(entry)
        if entry not in self.held:
            self.happen(Admitted(entry, "rev-gone"))
            return
        held = self.held[entry]
        self.admitted[held.source] = f"rev-{held.content}"
        self.happen(Admitted(entry, f"rev-{held.content}"))

    @precondition(lambda self: self.evicting)
    @rule(data=st.data())
    def evicted(self, data: st.DataObject) -> None:
        self.finish_evicting(data.draw(st.sampled_from(sorted(self.evicting))))

    def finish_evicting(self, entry: int) -> None:
        self.evicting.remove(entry)
        del self.held[entry]
        self.happen(Evicted(entry))

    @rule(uri=st.sampled_from(URIS))
    def ask_to_evict(self, uri: str) -> None:
        self.numbers += 1
        self.evictions[self.numbers] = uri
        self.happen(EvictAsked(self.numbers, uri))
        assert self.numbers not in self.evictions, "whoever asks is answered"

    @rule(target=clients_asked, uri=st.sampled_from(URIS))
    def offer(self, uri: str) -> int:
        self.numbers += 1
        self.clients[self.numbers] = Client(uri, "")
        self.offers[self.numbers] = uri
        self.happen(OfferAsked(self.numbers, uri))
        return self.numbers

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), proved=st.booleans())
    def examine(self, data: st.DataObject, proved: bool) -> None:
        self.finish_offer(data.draw(st.sampled_from(sorted(self.offers))), proved)

    def finish_offer(self, lease: int, proved: bool) -> None:
        uri = self.offers.pop(lease)
        if not proved:
            self.happen(OfferFailed(lease, uri, "lies"))
            return
        content = self.content[uri]
        self.proved = f"{uri}#{content}"
        same = next((n for n in sorted(self.beyond & set(self.held)) if self.held[n].source == self.proved), 0)
        self.happen(Offered(lease, uri, plan(self.proved, CONTENTS[content]), f"rev-{content}", same))

    @rule(uri=st.sampled_from(URIS), pinned=st.booleans())
    def pin(self, uri: str, pinned: bool) -> None:
        self.numbers += 1
        self.pinning.add(self.numbers)
        self.happen(PinAsked(self.numbers, uri, pinned))
        assert self.numbers not in self.pinning, "whoever asks is answered"

    @rule(uri=st.sampled_from(URIS), content=st.sampled_from(list(CONTENTS)))
    def overwrite(self, uri: str, content: str) -> None:
        self.content[uri] = content
        self.history[uri].add(content)

    @rule(seconds=st.sampled_from([0.0, 1.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=clients_asked, uri=st.sampled_from(URIS), count=st.integers(2, 4))
    def ask_together(self, uri: str, count: int):
        return multiple(*(self.ask(uri, "") for _ in range(count)))

    @rule()
    def settle(self) -> None:
        """Everything that is under way comes to its end, so that sequences of several models are not rare."""
        while (
            self.offers
            or self.resolving
            or self.entries_that_are("reserving", "loading")
            or self.admitting
            or self.evicting
        ):
            for lease in sorted(self.offers):
                self.finish_offer(lease, lease % 2 == 0)
            for uri in sorted(self.resolving):
                self.finish_resolving(uri)
            for entry in self.entries_that_are("reserving"):
                self.held[entry].state = "loading"
                self.happen(Reserved(entry))
            for entry in self.entries_that_are("loading"):
                self.held[entry].state = "ready"
                self.happen(Loaded(entry))
            for entry in sorted(self.admitting):
                self.finish_admitting(entry)
            for entry in sorted(self.evicting):
                self.finish_evicting(entry)

    # --- what must hold

    @invariant()
    def books_agree(self) -> None:
        assert set(self.residency.entries) == set(self.held)
        assert self.residency.used == sum(map(self.bytes, self.held))
        for number, entry in self.residency.entries.items():
            expected = "evicting" if number in self.evicting else self.held[number].state
            assert entry.state == ("loading" if expected == "reserving" else expected)
        for lease, client in self.clients.items():
            holds = [number for number, entry in self.residency.entries.items() if lease in entry.leases]
            assert len(holds) <= 1
            assert not (client.over and holds), "a lease that is over holds nothing"

    @invariant()
    def the_budget_is_kept(self) -> None:
        """Adopted bytes may exceed it; nothing is loaded beside them then."""
        if not self.beyond & set(self.alive()):
            assert sum(map(self.bytes, self.alive())) <= CAPACITY

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """A lease that is neither complete nor over waits for something that is under way."""
        for lease, client in self.clients.items():
            if client.over or "complete" in client.replies:
                continue
            holds = [number for number in self.alive() if lease in self.leases(number)]
            if holds:
                assert self.held[holds[0]].state != "ready" or holds[0] in self.admitting
            else:
                assert client.uri in self.resolving or client.uri in self.offers.values()

    def teardown(self) -> None:
        """In the end each lease is complete or refused, and equal bytes are one copy."""
        self.settle()
        for client in self.clients.values():
            assert client.over or "complete" in client.replies
        for lease, client in self.clients.items():
            if client.open:
                client.open = False
                self.happen(LeaseClosed(lease))
        for entry in sorted(self.evicting):
            self.finish_evicting(entry)
        contents = [held.content for held in self.held.values()]
        assert len(contents) == len(set(contents)), "equal bytes stay in memory twice"
        self.books_agree()


TestDriver = Driver.TestCase
TestDriver.settings = settings(stateful_step_count=40)
