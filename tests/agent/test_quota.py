"""Quotas of memory, and eviction of what is held: what an account holds alone, what it shares, what goes later."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.errors import EvictRefused, NoCapacity
from cache_agent.model.manifest import Manifest
from cache_agent.policy.quota import Account
from cache_agent.residency import events
from cache_agent.residency.events import (
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
    PinAsked,
    PinDone,
    Refuse,
    Reserved,
    Resolved,
)
from cache_agent.residency.machine import Residency

LLM, WEB = Account("namespace llm", 250), Account("namespace web", 250)


def plan(source: str, size: int = 100) -> Manifest:
    return Manifest(source=source, tensors=(), segments=(size,), weight_files=(), files={})


class Machine:
    """A residency whose loads succeed at once. `who` are the leases that were granted, by their account."""

    def __init__(self, capacity: int = 1000) -> None:
        self.residency = Residency(capacity)
        self.lease = 0
        self.now = 0.0

    def __call__(self, *happened: events.Event) -> list[events.Action]:
        actions: list[events.Action] = []
        for event in happened:
            actions += self.residency.handle(event, self.now)
        return actions

    def ask(self, uri: str, account: Account, *, source: str = "", size: int = 100) -> tuple[int, NoCapacity | None]:
        """A lease, and why it was refused."""
        self.lease += 1
        actions = self(LeaseAsked(self.lease, uri, "", account))
        if any(isinstance(action, events.Resolve) for action in actions):
            actions += self(Resolved(uri, plan(source or uri, size)))
        for action in list(actions):
            if isinstance(action, Load):
                actions += self(Reserved(action.entry), Loaded(action.entry))
            if isinstance(action, Evict):
                self(Evicted(action.entry))
        refused = [action.error for action in actions if isinstance(action, Refuse) and action.lease == self.lease]
        granted = [action for action in actions if isinstance(action, (Grant, Complete)) and action.lease == self.lease]
        assert bool(refused) != bool(granted)
        return self.lease, refused[0] if refused else None


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_an_account_holds_what_fits_its_quota(machine: Machine) -> None:
    for model in "ab":
        assert machine.ask(f"s3://{model}/m", LLM)[1] is None
    _, error = machine.ask("s3://c/m", LLM)
    assert isinstance(error, NoCapacity)
    for word in ("namespace llm", "0 MB", "s3://a/m", "s3://b/m", "rights file"):
        assert word in error.text
    assert machine.ask("s3://a/m", LLM)[1] is None, "what it has counts once"
    assert machine.ask("s3://c/m", WEB)[1] is None, "and is another's quota"
    assert machine.ask("s3://d/m", Account("namespace free"))[1] is None


def test_what_two_hold_counts_for_neither(machine: Machine) -> None:
    machine.ask("s3://a/m", LLM)
    machine.ask("s3://b/m", LLM)
    assert machine.ask("s3://c/m", LLM)[1]
    shared, _ = machine.ask("s3://a/m", WEB)
    assert machine.ask("s3://c/m", LLM)[1] is None
    assert machine.ask("s3://d/m", WEB)[1] is None
    machine(LeaseClosed(shared))
    assert machine.ask("s3://a/m", LLM)[1] is None, "nothing is taken back when the other lets go"
    assert machine.ask("s3://e/m", LLM)[1], "and nothing further is given"


def test_what_nobody_holds_counts_for_nobody(machine: Machine) -> None:
    for model in "abc":
        lease, error = machine.ask(f"s3://{model}/m", LLM)
        assert error is None
        machine(LeaseClosed(lease))
    machine.ask("s3://a/m", LLM)
    machine.ask("s3://b/m", LLM)
    assert machine.ask("s3://c/m", LLM)[1], "it is resident, and would be held"


def test_a_pin_is_held_on_the_account_of_who_pinned(machine: Machine) -> None:
    for model in "abc":
        lease, _ = machine.ask(f"s3://{model}/m", Account(""))
        machine(LeaseClosed(lease))
    assert machine(PinAsked(90, "s3://a/m", True, LLM)) == [PinDone(90, 100)]
    assert machine(PinAsked(91, "s3://b/m", True, LLM)) == [PinDone(91, 100)]
    (refuse,) = machine(PinAsked(92, "s3://c/m", True, LLM))
    assert isinstance(refuse, Refuse)
    assert isinstance(refuse.error, NoCapacity)
    assert machine.ask("s3://a/m", LLM)[1] is None
    machine(PinAsked(93, "s3://b/m", False, LLM))
    assert machine.ask("s3://c/m", LLM)[1] is None


def test_those_who_come_together_share_from_the_beginning(machine: Machine) -> None:
    machine(LeaseAsked(1, "s3://big/m", "", LLM), LeaseAsked(2, "s3://big/m", "", WEB))
    (load,) = machine(Resolved("s3://big/m", plan("big", 300)))
    assert isinstance(load, Load)
    machine(LeaseAsked(3, "s3://huge/m", "", LLM), LeaseAsked(4, "s3://huge/m", "", LLM))
    refused = machine(Resolved("s3://huge/m", plan("huge", 300)))
    assert [type(action) for action in refused] == [Refuse, Refuse]
    assert machine.residency.used == 300, "and nothing was begun for them"


def test_who_may_not_know_of_a_model_is_not_told_who_takes_the_room() -> None:
    machine = Machine(capacity=250)
    machine.ask("s3://llm/a", Account("x"))
    machine.ask("s3://web/b", Account("y"))
    _, error = machine.ask("s3://llm/c", Account("x"))
    assert error is not None
    assert "s3://llm/a" in error.text
    assert "s3://web/b" in error.text
    told = error.text_for(lambda uri: uri.startswith("s3://llm/"))
    assert ("s3://llm/a" in told, "s3://web/b" in told, "and 1 more" in told) == (True, False, True)
    assert "by 2 other models" in error.text_for(lambda _: False)


ACCOUNTS = [Account("a", 300), Account("b", 200), Account("c")]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("close"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("pin"), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("unpin"), st.integers(0, 2), st.integers(0, 5)),
    ),
    max_size=40,
)


@given(STEPS)
def test_nobody_is_given_more_than_his_quota_for_himself(steps: list[tuple[str, int, int]]) -> None:
    """Against a model that only knows who holds what: (account, URI) once per lease or pin."""
    machine = Machine(capacity=10_000)
    leases: dict[int, tuple[str, str]] = {}
    pins: dict[str, str] = {}
    sizes = {f"s3://m/{number}": 40 + 30 * number for number in range(6)}

    def holders(uri: str) -> set[str]:
        return {name for name, held in leases.values() if held == uri} | ({pins[uri]} if uri in pins else set())

    def own(name: str) -> int:
        return sum(size for uri, size in sizes.items() if holders(uri) == {name})

    for what, first, second in steps:
        uri = f"s3://m/{second}"
        if what == "close":
            if leases:
                lease = list(leases)[first % len(leases)]
                del leases[lease]
                machine(LeaseClosed(lease))
            continue
        account = ACCOUNTS[first]
        before, held = own(account.name), holders(uri)
        allowed = account.quota is None or bool(held) or before + sizes[uri] <= account.quota
        if what == "ask":
            lease, error = machine.ask(uri, account, size=sizes[uri])
            assert (error is None) == allowed
            if error is None:
                leases[lease] = (account.name, uri)
            else:
                machine(LeaseClosed(lease))
        elif machine.residency.entry_of(uri) is not None:
            (answer,) = machine(PinAsked(10**6, uri, what == "pin", account))
            if what == "unpin":
                pins.pop(uri, None)
            elif isinstance(answer, PinDone):
                assert allowed
                pins[uri] = account.name
            else:
                assert not allowed
    assert len(machine.residency._accounts.leases) == len(leases), "closed leases are forgotten"


# --- copies from before the origin changed ----------------------------------------------------------------------------


def changed(machine: Machine, revision: str = "rev-old") -> int:
    """A model whose older copy a function holds; that function's lease."""
    old, _ = machine.ask("s3://a/m", LLM, source="old")
    machine(events.Admitted(1, revision))
    machine.now += 100
    lease, _ = machine.ask("s3://a/m", WEB)  # granted the old one, and checked behind it
    machine(Resolved("s3://a/m", plan("new")), LeaseClosed(lease))
    lease, _ = machine.ask("s3://a/m", WEB, source="new")
    machine(LeaseClosed(lease))
    assert [entry.manifest.source for entry in machine.residency.entries.values()] == ["old", "new"]
    return old


def test_evicting_takes_the_new_copy_now_and_the_older_one_when_it_is_free(machine: Machine) -> None:
    old = changed(machine)
    evict, done = machine(EvictAsked(90, "s3://a/m"))
    assert (type(evict), evict.entry) == (Evict, 2)
    assert isinstance(done, EvictDone)
    assert done.bytes == 100
    for word in ("rev-old", "held by a function", "goes when it is free"):
        assert word in done.stays
    machine(Evicted(2))
    lease, _ = machine.ask("s3://a/m", WEB, source="newer")
    assert lease not in machine.residency.entries[1].leases, "no new lease finds what is to go"
    (evict,) = machine(LeaseClosed(old))
    assert (evict.entry, evict.why) == (1, "asked for while it was held")
    machine(Evicted(1))
    assert list(machine.residency.entries) == [3]


def test_a_held_model_stays_and_the_answer_names_every_copy(machine: Machine) -> None:
    changed(machine)
    machine.ask("s3://a/m", WEB)
    (refuse,) = machine(EvictAsked(90, "s3://a/m"))
    assert isinstance(refuse, Refuse)
    assert isinstance(refuse.error, EvictRefused)
    for word in ("rev-old", "goes when it is free", "held by a function"):
        assert word in refuse.error.text


def test_an_older_copy_that_nobody_holds_goes_with_the_new_one(machine: Machine) -> None:
    machine(LeaseClosed(changed(machine)))
    *gone, done = machine(EvictAsked(90, "s3://a/m"))
    assert [action.entry for action in gone] == [1, 2]
    assert done == EvictDone(90, 200)


def test_a_doomed_copy_is_not_lent_by_its_revision(machine: Machine) -> None:
    changed(machine)
    machine(EvictAsked(90, "s3://a/m"), Evicted(2))
    assert machine(LeaseAsked(50, "s3://a/m", "rev-old", WEB)) == [events.Resolve("s3://a/m")]


def test_the_agent_says_what_stays_and_evicts_it_later(
    start_local_agent, checkpoint_files, eventually, write_checkpoint
) -> None:
    from cache_agent.tiers.fake import FakeOrigin

    agent = start_local_agent({"fake://m": FakeOrigin("fake://m", checkpoint_files(seed=1))}, revalidate=0.0)
    with agent.client.lease("fake://m") as old:
        old.wait_ready(time.monotonic() + 20)
        agent.origins["fake://m"] = FakeOrigin("fake://m", checkpoint_files(seed=2))
        agent.client.lease("fake://m").close()  # granted the old one, and the origin is looked at behind it
        eventually(lambda: agent.agent._ledger.residency.entry_of("fake://m") is None, what="the change was seen")
        with agent.client.lease("fake://m") as new:
            new.wait_ready(time.monotonic() + 20)
        eventually(lambda: sorted(model.leases for model in agent.client.status().models) == [0, 1])
        reply = agent.client.evicted("fake://m")
        assert reply.bytes == new.manifest.nbytes
        assert "goes when it is free" in reply.stays
        assert [model.leases for model in agent.client.status().models] == [1]
    eventually(lambda: agent.client.status().models == [], what="the older copy went with its last function")
