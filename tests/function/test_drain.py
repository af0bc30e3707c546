"""A draining replica: its requests continue in another one, and its clients, which stay connected, notice nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import toy_worker
from replicas import CHAT, WORDS, LocalAgent, Replica, chat, frames, parsed, replicas, said

from cache_agent.client import handoff as reports
from cache_agent.errors import StoreUnavailable
from cache_agent.snapshots.store import Key
from runtime.handoff import migration, orphans
from runtime.handoff import pipe as pipes
from runtime.handoff.pipe import Broken
from runtime.handoff.relay import Relay
from runtime.resume.client import ask
from runtime.resume.seal import Sealed
from runtime.resume.snapshot import ReplicaIdentity


@pytest.fixture
def agent() -> Iterator[LocalAgent]:
    with LocalAgent.running() as agent:
        yield agent


@pytest.fixture
def replica(agent: Any, serve: Callable[..., Any]) -> Iterator[Callable[..., Replica]]:
    with replicas(agent, serve, move=True) as make:
        yield make


FEW = " ".join(f"w{n}" for n in range(15))
SLOW = 0.05  # seconds per token of a source: what it answers is never over before it has moved


class Clients:
    """Answers being read, each by a thread of its own."""

    def __init__(self, eventually: Callable[..., Any]) -> None:
        self._pool = ThreadPoolExecutor(32)
        self._eventually = eventually
        self.answers: list[Future[list[Any]]] = []

    def ask(self, replica: Replica, count: int = 1, **more: Any) -> list[Future[list[Any]]]:
        """Start streams, and wait until each has sent an event."""
        before = replica.running
        made = [self._pool.submit(self._read, replica, chat(**more)) for _ in range(count)]
        self._eventually(lambda: replica.running >= before + count * more.get("n", 1), what="the streams run")
        self.answers += made
        return made

    def _read(self, replica: Replica, body: Any) -> list[Any]:
        status, _, data = replica.post(CHAT, body)
        assert status == 200, data
        return parsed(data)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def clients(eventually: Callable[..., Any]) -> Iterator[Clients]:
    made = Clients(eventually)
    yield made
    made.close()


def check(events: list[Any], whole: list[Any]) -> None:
    """Return an answer without its id and time."""
    assert said(events) == said(whole)
    usage, wanted = ([frame["usage"] for frame in frames(each) if frame["usage"]] for each in (events, whole))
    assert usage == wanted
    assert events[-1].data == "[DONE]"
    assert not [event for event in events if "error" in event.data[:12]]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
def test_streams_go_on_in_another_replica(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any], keep: bool
) -> None:
    first, second = replica(keep=keep, delay=SLOW), replica(keep=keep)
    body = {"temperature": 1.0, "seed": 5}
    whole = parsed(second.post(CHAT, chat(**body))[2])
    answers = clients.ask(first, 6, **body)
    first.drain()
    assert first.released.wait(20), "its engine is gone before the streams have ended"
    assert second.running
    for answer in answers:
        check(answer.result(30), whole)
    moved = eventually(lambda: len(agent.handoffs()) == 6 and agent.handoffs())
    assert {(item.outcome, item.how) for item in moved} == {("moved", "recompute")}
    assert agent.agent.journal.counts().handoffs == {("moved", "recompute"): 6}


def test_every_choice_of_a_request_moves_with_it(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    first, second = replica(delay=SLOW), replica()
    body = {"temperature": 1.0, "seed": 5, "n": 3}
    whole = parsed(second.post(CHAT, chat(**body))[2])
    (answer,) = clients.ask(first, 1, **body)
    first.drain()
    events = answer.result(30)
    for choice in range(3):
        assert said(events, choice) == said(whole, choice)
    assert frames(events)[-1]["usage"] == frames(whole)[-1]["usage"]
    (item,) = eventually(lambda: agent.handoffs())
    assert item.outcome == "moved"
    history = agent.store.history(Key("chat", item.id))
    assert [(change.epoch, change.owner) for change in history] == [(1, first.name), (2, second.name)]


def test_what_comes_while_it_drains_is_answered_through_it(replica: Callable[..., Replica], clients: Clients) -> None:
    first, second = replica(delay=SLOW), replica()
    whole = parsed(second.post(CHAT, chat())[2])
    running = clients.ask(first, 2)
    first.drain()
    assert first.released.wait(20)
    check(parsed(first.post(CHAT, chat())[2]), whole)
    plain = first.post(CHAT, {**chat(), "stream": False, "stream_options": None})
    assert json.loads(plain[2])["choices"][0]["message"]["content"] == WORDS
    embedded = first.post("/v1/embeddings", {"input": "a b"})
    assert json.loads(embedded[2]) == json.loads(second.post("/v1/embeddings", {"input": "a b"})[2])
    for answer in running:
        check(answer.result(30), whole)


def test_without_a_destination_it_goes_on_and_one_that_comes_later_takes_over(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    first = replica(delay=SLOW)
    answers = clients.ask(first, 2)
    first.drain()
    late = clients.ask(first, 1)
    assert not first.released.is_set()
    second = replica()
    assert first.released.wait(20)
    for answer in [*answers, *late]:
        assert said(answer.result(30)) == WORDS
    moved = eventually(lambda: len(agent.handoffs()) == 3 and agent.handoffs())
    assert {item.destination for item in moved} == {second.name}


def test_ten_drains_in_a_row_of_one_stream(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    replicas = [replica(delay=SLOW), replica(delay=SLOW)]
    body = {"temperature": 1.0, "seed": 7, "messages": [{"role": "user", "content": " ".join([WORDS] * 4)}]}
    whole = parsed(replica(delay=0.0, place=ReplicaIdentity("toy", "other", "tok")).post(CHAT, chat(**body))[2])
    (answer,) = clients.ask(replicas[0], 1, **body)
    for number in range(10):
        replicas[number].drain()
        eventually(lambda number=number: len(agent.handoffs()) == number + 1, 20, f"drain {number} has moved it")
        replicas.append(replica(delay=SLOW if number < 8 else 0.0))
    check(answer.result(60), whole)
    assert {item.outcome for item in agent.handoffs()} == {"moved"}
    assert [item.source for item in agent.handoffs()][::-1] == [each.name for each in replicas[:10]]
    owners = agent.store.history(Key("chat", agent.handoffs()[0].id))
    assert [change.epoch for change in owners] == list(range(1, 12))


def test_the_client_of_a_source_that_ends_has_the_rest_elsewhere(
    replica: Callable[..., Replica], agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    first, second = replica(delay=SLOW), replica(delay=0.006)
    events = []
    for number, event in enumerate(ask([first.url, second.url], CHAT, chat())):
        events.append(event)
        if number == 3:
            first.drain()
            assert first.released.wait(20)
            first.close()  # the platform's patience is over
    assert said(events) == WORDS
    assert frames(events)[-1]["usage"]["completion_tokens"] == len(WORDS.encode()) + 1


def test_a_client_that_leaves_ends_what_runs_for_it_elsewhere(
    replica: Callable[..., Replica], eventually: Callable[..., Any]
) -> None:
    first, second = replica(delay=SLOW), replica(delay=SLOW)
    left, enough = threading.Event(), threading.Event()

    def read() -> None:
        for event in ask([first.url], CHAT, chat()):
            enough.set()
            if left.is_set():
                return
            assert event

    thread = threading.Thread(target=read)
    thread.start()
    assert enough.wait(20)
    first.drain()
    eventually(lambda: second.running == 1, 20)
    left.set()
    thread.join(20)
    eventually(lambda: second.running == 0, 20, "the destination has heard of it")


@pytest.mark.parametrize("other", ["revision", "key"])
def test_a_replica_of_another_kind_gets_nothing(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, other: str
) -> None:
    first = replica()
    options = (
        {"place": ReplicaIdentity("toy", "another", "tok")} if other == "revision" else {"seal": Sealed(b"k" * 32)}
    )
    second = replica(**options)
    answers = clients.ask(first, 2)
    first.drain()
    for answer in answers:
        assert said(answer.result(30)) == WORDS
    assert not second.running
    assert not agent.handoffs()


def test_what_has_no_room_elsewhere_stays_and_moves_later(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    first, second = replica(delay=SLOW, slots=4), replica(delay=0.0, slots=2)
    answers = clients.ask(first, 4)
    first.drain()
    for answer in answers:
        assert said(answer.result(60)) == WORDS
    eventually(lambda: [item.outcome for item in agent.handoffs()].count("moved") >= 2)
    assert {item.outcome for item in agent.handoffs()} <= {"moved", "back"}
    assert second.lifecycle.state == "ready"


def test_one_that_is_full_is_not_asked(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    full = replica(delay=SLOW, slots=1)
    busy = clients.ask(full, 1, messages=[{"role": "user", "content": FEW}])
    destinations = agent.server.broker._destinations._waiting
    eventually(lambda: not destinations, 20, "it waits for nobody while it has no free slot")
    free, first = replica(), replica(delay=SLOW)
    answers = clients.ask(first, 3)
    first.drain()
    assert first.released.wait(20)
    for answer in answers:
        assert said(answer.result(30)) == WORDS
    assert said(busy[0].result(30)) == FEW
    moved = eventually(lambda: len(agent.handoffs()) == 3 and agent.handoffs())
    assert {(item.destination, item.outcome) for item in moved} == {(free.name, "moved")}
    eventually(lambda: any(waiting.owner == full.name for waiting in destinations.values()), 20, "it has a slot again")


def test_sealed_streams_move_too(replica: Callable[..., Replica], clients: Clients) -> None:
    first, second = replica(delay=SLOW, seal=Sealed(b"k" * 32)), replica(seal=Sealed(b"k" * 32))
    answers = clients.ask(first, 2)
    first.drain()
    assert first.released.wait(20)
    for answer in answers:
        assert said(answer.result(30)) == WORDS
    assert second.lifecycle.state == "ready"


def test_a_worker_that_ends_waits_until_its_agent_has_heard_of_what_moved(
    replica: Callable[..., Replica],
    clients: Clients,
    agent: LocalAgent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An agent so busy that one report after the other runs out of time; in the end it has them all, each once."""
    free, asked, handed = threading.Event(), threading.Semaphore(0), agent.agent.journal.handed

    def busy(*arguments: Any) -> None:
        asked.release()
        assert free.wait(60)
        handed(*arguments)

    monkeypatch.setattr(agent.agent.journal, "handed", busy)
    monkeypatch.setattr(reports, "_REPORT_SECONDS", 0.2)
    first, second = replica(delay=SLOW), replica()
    answers = clients.ask(first, 2)
    first.drain()
    for answer in answers:
        assert said(answer.result(60)) == WORDS
    assert second.lifecycle.state == "ready"
    assert first.handoffs is not None
    end = threading.Thread(target=first.handoffs.close, args=("the replica ends", time.monotonic() + 60))
    end.start()
    for _ in range(3):
        assert asked.acquire(timeout=60)
    assert end.is_alive()
    free.set()
    end.join(60)
    assert [item.outcome for item in agent.handoffs()] == ["moved", "moved"]


# --- what may go wrong ------------------------------------------------------------------------------------------------


def read_while_draining(first: Replica, second: Replica, eventually: Callable[..., Any]) -> list[Any]:
    """Return all events of an answer of the first replica, which drains after a few; a broken answer is resumed."""
    events: list[Any] = []
    for number, event in enumerate(ask([first.url, second.url], CHAT, chat())):
        events.append(event)
        if number == 3:
            first.drain()
    return events


def owners(agent: LocalAgent, events: list[Any]) -> list[str]:
    """Return the owners of the request, the first one first; every epoch once."""
    history = agent.store.history(Key("chat", events[-1].id.partition(":")[0]))
    assert [change.epoch for change in history] == list(range(1, len(history) + 1))
    return [change.owner for change in history]


def test_a_destination_that_is_stopped_in_the_middle_of_a_copy_aborts_back_in_time(
    replica: Callable[..., Replica],
    clients: Clients,
    agent: LocalAgent,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A process that SIGSTOP hits when the copy has been announced; the prompt is more than a socket holds."""
    monkeypatch.setattr(pipes, "STALL", 2.0)  # a busy machine keeps a destination that is well waiting for less
    monkeypatch.setattr(migration, "ANSWER", 2.0)
    first = replica(delay=SLOW)
    long = [{"role": "user", "content": "x" * 60_000}, {"role": "user", "content": WORDS}]
    (answer,) = clients.ask(first, 1, messages=long)
    arguments = [toy_worker.__file__, str(agent.path), "halting-worker", str(tmp_path / "told"), "halting"]
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        try:
            assert other.stdout is not None
            assert int(other.stdout.readline())
            first.drain()
            state = Path(f"/proc/{other.pid}/stat")
            eventually(lambda: state.read_text().rpartition(") ")[2][0] == "T", 20, "it stands still")
            (item,) = eventually(lambda: agent.handoffs(), 10, "the source has it back")
            assert (item.destination, item.outcome) == ("halting-worker", "back")
            assert said(answer.result(60)) == WORDS
        finally:
            other.kill()


def test_a_store_that_is_away_for_a_moment_is_asked_again(
    replica: Callable[..., Replica], agent: LocalAgent, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = replica(delay=SLOW), replica()
    transfer, answers = agent.store.transfer, iter([StoreUnavailable("it is away")] * 3)

    def sometimes(*arguments: Any) -> bool:
        for error in answers:
            raise error
        return transfer(*arguments)

    monkeypatch.setattr(agent.store, "transfer", sometimes)
    events = read_while_draining(first, second, eventually)
    assert said(events) == WORDS
    assert owners(agent, events) == [first.name, second.name]


@pytest.mark.parametrize("answer", ["it cannot say", "another's"])
def test_what_is_nobodys_for_sure_is_given_up_and_can_be_resumed(
    replica: Callable[..., Replica],
    agent: LocalAgent,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
) -> None:
    first, second = replica(delay=SLOW), replica()

    def never(*_: Any) -> bool:
        if answer == "another's":
            return False
        raise StoreUnavailable("it is away")

    monkeypatch.setattr(migration, "_COMMIT", 0.3)
    monkeypatch.setattr(agent.store, "transfer", never)
    events = read_while_draining(first, second, eventually)
    assert said(events) == WORDS
    assert frames(events)[-1]["usage"]["completion_tokens"] == len(WORDS.encode()) + 1
    (item,) = eventually(agent.handoffs)
    assert (item.outcome, item.how) == ("lost", "recompute")
    assert owners(agent, events)[0] == first.name


def test_what_was_made_over_to_one_who_is_gone_is_taken_back(
    replica: Callable[..., Replica], agent: LocalAgent, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = replica(delay=0.01), replica()

    def gone(relay: Relay, *_: Any) -> None:
        relay.close("it is gone")
        raise Broken("it is gone")

    monkeypatch.setattr(Relay, "go", gone)
    events = read_while_draining(first, second, eventually)
    assert said(events) == WORDS
    assert len({event.id.partition(":")[0] for event in events}) == 1
    eventually(lambda: "back" in {item.outcome for item in agent.handoffs()})
    found = owners(agent, events)
    assert found[:3] == [first.name, second.name, first.name]
    assert found[-1] == first.name, "its client never had to ask anybody else"


def vanish(second: Replica, first: Replica) -> None:
    """Cut the second replica off, as a kill does: the first hears nothing of it, and no request is sent to it."""
    assert first.handoffs is not None
    assert second.handoffs is not None
    second.handoffs._destination.leave()
    relay = first.handoffs._departure._relay
    assert relay is not None
    relay.close("it is gone")


def test_a_request_outlives_its_destination_under_an_epoch_of_its_own(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    first, second = replica(delay=SLOW), replica(delay=SLOW)
    body = {"temperature": 1.0, "seed": 5, "n": 2}
    (answer,) = clients.ask(first, 1, **body)
    first.drain()
    assert first.released.wait(20)
    third = replica()
    whole = parsed(third.post(CHAT, chat(**body))[2])
    vanish(second, first)
    events = answer.result(30)
    for choice in range(2):
        assert said(events, choice) == said(whole, choice)
    assert frames(events)[-1]["usage"] == frames(whole)[-1]["usage"]
    last, _ = eventually(lambda: len(agent.handoffs()) == 2 and agent.handoffs())
    assert (last.destination, last.outcome, last.how) == (third.name, "moved", "recompute")
    history = agent.store.history(Key("chat", last.id))
    assert [change.owner for change in history] == [first.name, second.name, first.name, third.name]
    assert [change.epoch for change in history] == [1, 2, 3, 4]


def test_with_nobody_left_its_client_hears_in_time_that_it_can_ask_again(
    replica: Callable[..., Replica], clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "PATIENCE", 0.5)
    first, second = replica(delay=SLOW), replica(delay=SLOW)
    (answer,) = clients.ask(first, 1)
    first.drain()
    assert first.released.wait(20)
    vanish(second, first)
    error = json.loads(answer.result(20)[-2].data)["error"]
    assert error["code"] == "moved"
    assert "ask for the rest" in error["message"]


def test_somebody_who_has_claimed_it_meanwhile_keeps_it(
    replica: Callable[..., Replica], clients: Clients, agent: LocalAgent, eventually: Callable[..., Any]
) -> None:
    first, second = replica(delay=SLOW), replica(delay=SLOW)
    (answer,) = clients.ask(first, 1)
    first.drain()
    assert first.released.wait(20)
    (moved,) = eventually(agent.handoffs)
    assert agent.store.transfer(Key("chat", moved.id), second.name, 2, "somebody-else", 30)
    replica()
    vanish(second, first)
    assert json.loads(answer.result(20)[-2].data)["error"]["code"] == "moved"
    assert agent.store.history(Key("chat", moved.id))[-1].owner == "somebody-else"
