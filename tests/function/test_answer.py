"""A running answer across its feeds, on real engines: each token once, a session that records all, one end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from replicas import LocalAgent

from cache_agent.client.snapshots import SnapshotClient
from runtime.engine.base import GenerationRequest, TokenEvent, TokenStream
from runtime.engine.toy import ToyCodec, ToyEngine
from runtime.handoff.live import LiveEngine
from runtime.resume.answer import Answer
from runtime.resume.record import AnswerContext
from runtime.resume.seal import Plain
from runtime.resume.sessions import Sessions
from runtime.resume.snapshot import ReplicaIdentity

COUNT = 60
REQUEST = GenerationRequest("gen-0123456789abcdef", tuple(ToyCodec().encode("one two drei")), COUNT)


@pytest.fixture
def engines() -> Iterator[list[ToyEngine]]:
    made = [ToyEngine(step_delay=0.002) for _ in range(3)]
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    with LocalAgent.running() as agent:
        client, place = SnapshotClient(lambda: agent.client), ReplicaIdentity("toy", "toy", "")
        sessions = Sessions(client, "answers", Plain(), lambda: place, owner="this-worker", every=4)
        yield sessions
        sessions.close(time.monotonic() + 2)


def whole(engine: ToyEngine) -> list[TokenEvent]:
    return list(engine.submit(replace(REQUEST, id="whole")))


def move(source: ToyEngine, destination: ToyEngine, answer: Answer) -> TokenStream:
    """Move a generation as a hand-off does, without the bytes in between."""
    feed = destination.admit(source.export(REQUEST.id))
    answer.attach(feed)
    source.forget(REQUEST.id)
    return feed


@pytest.mark.parametrize("read", [0, 1, 5])
def test_a_reader_that_is_slower_than_two_moves_misses_no_token(
    engines: list[ToyEngine], eventually: Callable[..., Any], read: int
) -> None:
    first, second, third = engines
    events = whole(third)
    live = LiveEngine(first)
    answer = live.submit(REQUEST)
    told = [next(answer) for _ in range(read)]
    eventually(lambda: len(first._rows[REQUEST.id].generation.generated) > 5)
    feed = move(first, second, answer)
    assert live.reader(feed) is answer
    eventually(lambda: len(second._rows[REQUEST.id].generation.generated) > 12)
    move(second, third, answer)
    told += list(answer)
    assert told == events
    assert live.reader(feed) is None
    assert live.here() == []


@pytest.mark.parametrize("kept", [0, 7, 20])
@pytest.mark.parametrize("seen", [0, 7, 15])
def test_a_record_and_the_engine_behind_it_tell_each_token_once(engines: list[ToyEngine], kept: int, seen: int) -> None:
    """`kept` tokens are in the record, `seen` are the client's already: fewer of them, as many, or more."""
    first, second, _ = engines
    events = whole(second)
    state = first.export(first.submit(REQUEST).request_id)
    state = replace(state, generated=tuple(event.token for event in events[:kept] if event.token is not None))
    state = replace(state, emitted=sum(len(event.text) for event in events[:kept]))
    feed = second.admit(state) if kept else second.submit(REQUEST)
    answer = Answer(REQUEST, feed).replay(events[seen:kept], seen)
    assert list(answer) == events[seen:]


def test_a_session_hears_of_what_is_made_again_and_not_told(engines: list[ToyEngine], sessions: Sessions) -> None:
    """Tokens that the client saw before a crash are recorded, too: otherwise no later one could be."""
    events = whole(engines[0])
    session = sessions.open(AnswerContext("chat", REQUEST.id), [REQUEST])
    answer = Answer(REQUEST, engines[0].submit(REQUEST)).keep(session, 0).replay((), 15)
    assert list(answer) == events[15:]
    assert session.tokens == [[event.token for event in events]]
    assert session.complete


def test_an_answer_whose_session_is_over_ends_and_makes_no_more_tokens(
    engines: list[ToyEngine], sessions: Sessions, eventually: Callable[..., Any]
) -> None:
    session = sessions.open(AnswerContext("chat", REQUEST.id), [REQUEST])
    answer = Answer(REQUEST, engines[0].submit(REQUEST)).keep(session, 0)
    told = [next(answer) for _ in range(3)]
    session.let_go("a test")
    last = next(answer)
    assert (last.index, last.finish) == (len(told), "moved")
    assert "a test" in (last.error or "")
    assert list(answer) == []
    eventually(lambda: not engines[0]._rows)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_reader_that_leaves_ends_every_feed(
    engines: list[ToyEngine], eventually: Callable[..., Any], late: bool
) -> None:
    """Also the one that a hand-off attaches just before it leaves, or just after."""
    first, second, _ = engines
    live = LiveEngine(first)
    answer = live.submit(replace(REQUEST, max_tokens=4000))  # which take longer than the wait below
    assert next(answer).index == 0
    feed = second.admit(first.export(REQUEST.id))
    for step in (answer.close, lambda: answer.attach(feed)) if late else (lambda: answer.attach(feed), answer.close):
        step()
    eventually(lambda: not first._rows and not second._rows, 4.0)
    assert list(answer) == []
    assert live.here() == []
