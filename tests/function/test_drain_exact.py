"""Exactness of migrations: tokens and text are those of the run that was not moved. Tiny models, real rows."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
from tiny import GREEDY, SAMPLED, ask, run, text_of

from runtime.engine.base import GenerationRequest, TokenEvent, TokenStream
from runtime.engine.batched import BatchedEngine
from runtime.engine.serial import TokenizerCodec
from runtime.handoff import migration
from runtime.handoff.adopted import AdoptedRequests
from runtime.handoff.departure import Departure
from runtime.handoff.live import LiveEngine
from runtime.handoff.messages import Probe, Probed
from runtime.handoff.migration import MigrationReport
from runtime.handoff.pipe import Pipe
from runtime.handoff.relay import Relay
from runtime.http.lifecycle import Lifecycle
from runtime.resume.seal import Plain
from runtime.resume.snapshot import ReplicaIdentity

COUNT = 40


class Pair:
    """A worker that will drain, its destinations, one after the other, and pipes to them; no request is kept."""

    def __init__(self, first: BatchedEngine, second: BatchedEngine, *further: BatchedEngine) -> None:
        self.first, self.second, self.further = first, second, further
        self.live = LiveEngine(first)
        self.told: list[MigrationReport] = []
        self.deaf = False  # the other one stands still from its first offer on
        self.releasable = True
        self.released = threading.Event()
        place = ReplicaIdentity("batched", "r", "t", "", first.arithmetic)
        self._departure = Departure(
            self.live, None, lambda: place, self._seek, lambda: self.releasable, self.released.set, self.told.append
        )
        self._identity, self._left = place, [second, *further]
        self.pipes: list[Pipe] = []  # the ends of those that go on

    def _seek(self) -> Relay | None:
        if not self._left:
            return None
        here, there = socket.socketpair()
        threading.Thread(target=self._serve, args=(there, self._left.pop(0)), daemon=True).start()
        pipe = Pipe(here, Plain(), source=True)
        return Relay(pipe, pipe.greet("siblings", "first"), self._identity)

    def _serve(self, end: socket.socket, engine: BatchedEngine) -> None:
        pipe = Pipe(end, Plain(), source=False)
        self.pipes.append(pipe)
        pipe.greet("siblings", "second", 16, 16)
        if self.deaf:
            while not isinstance(pipe.receive(1), Probe):
                pass
            pipe.send(Probed())
            return
        AdoptedRequests(pipe, _Here(engine), lambda: self._identity, lambda: False, Lifecycle("second", 64)).run()

    def drain(self) -> None:
        self._departure.begin()

    def close(self) -> None:
        self._departure.close("the test is over", time.monotonic() + 5)
        for engine in (self.first, self.second, *self.further):
            engine.close()


class Gate:
    """Let an engine make one step at a time, so that a request does not end before it migrates."""

    def __init__(self, engine: BatchedEngine) -> None:
        self._permits, self._open, original = threading.Semaphore(0), False, engine.step

        def step(rows: Any) -> Any:
            if not self._open:
                self._permits.acquire(timeout=30)
            return original(rows)

        vars(engine)["step"] = step
        exported = engine.export

        def export(*arguments: Any, **options: Any) -> Any:
            """A generation is given away between two steps: they go on for as long as that takes."""
            done = threading.Event()

            def go_on() -> None:
                while not done.wait(0.01):
                    self._permits.release()

            threading.Thread(target=go_on).start()
            try:
                return exported(*arguments, **options)
            finally:
                done.set()

        vars(engine)["export"] = export

    def read(self, stream: TokenStream, count: int) -> list[TokenEvent]:
        """Return so many events of a stream."""
        events: list[TokenEvent] = []
        while len(events) < count:
            if (event := stream.next(0.0)) is None:
                self._permits.release()
                event = stream.next(0.5)
            events += [event] if event is not None else []
        return events

    def open(self) -> None:
        self._open = True
        self._permits.release()


class _Here:
    sessions = None

    def __init__(self, engine: BatchedEngine) -> None:
        self.engine = engine


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(dtype: str, *, deterministic: bool = False, eos: Sequence[int] = (0,), count: int = 2) -> Pair:
        engines = [
            BatchedEngine(
                tiny.tiny("llama", dtype),
                TokenizerCodec(tiny.tokenizer(), eos),
                revision="r",
                memory=64 << 20,
                deterministic=deterministic,
                threads=1,
            )
            for _ in range(count)
        ]
        made.append(Pair(*engines))
        return made[-1]

    yield make
    for each in made:
        each.close()


def moved(pair: Pair, request: GenerationRequest, cut: int, beside: int = 0) -> list[TokenEvent]:
    """Return the events of a request that migrates after `cut` of them, with so many others on either side."""
    others = [ask(f"other-{n}", 80, prompt=tiny.prompt_of(20 + 30 * n, n), sampling=SAMPLED) for n in range(beside)]
    gate = Gate(pair.first)
    stream = pair.live.submit(request)  # the first one to be moved
    neighbours = [pair.live.submit(other) for other in others]
    neighbours += [pair.second.submit(replace(other, id=f"{other.id}-there")) for other in others]
    events = gate.read(stream, cut)
    pair.drain()
    rows = pair.first._rows
    # It is being frozen, has left, or has come back already: it stands still only for as long as its state travels.
    tiny.until(lambda: (row := rows.get(request.id)) is None or row.paused or bool(pair.told))
    gate.open()
    events += list(stream)
    for neighbour in neighbours:
        neighbour.close()
    return events


def outcome(pair: Pair, request_id: str) -> MigrationReport:
    tiny.until(lambda: any(told.id == request_id for told in pair.told))
    return next(told for told in pair.told if told.id == request_id)


@pytest.mark.parametrize("beside", [0, 3], ids=["alone", "among neighbours"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [1, 23])
def test_the_tokens_and_texts_of_the_run_that_was_not_moved(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, dtype: str, sampling: Any, beside: int, cut: int
) -> None:
    """In bfloat16 the others must not matter, which takes the deterministic mode."""
    monkeypatch.setattr(Relay, "measure", lambda self: setattr(self, "speed", 1e15))  # so that rows travel
    tested = pair(dtype, deterministic=dtype == "bfloat16")
    request = ask("moved", COUNT, sampling=sampling, deterministic=dtype == "bfloat16")
    whole = run(tested.second, replace(request, id="whole"))
    events = moved(tested, request, cut, beside)
    assert [event.token for event in events] == [event.token for event in whole]
    assert [event.index for event in events] == list(range(len(whole)))
    assert text_of(events) == text_of(whole)
    assert events[-1].finish == whole[-1].finish
    told = outcome(tested, "moved")
    assert (told.outcome, told.how) == ("moved", "kv")


def test_bfloat16_alone_needs_no_mode(pair: Callable[..., Pair]) -> None:
    tested = pair("bfloat16")
    request = ask("moved", COUNT, sampling=SAMPLED)
    whole = run(tested.second, replace(request, id="whole"))
    assert moved(tested, request, 11) == whole


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_stop_strings_and_characters_across_the_cut(pair: Callable[..., Pair], cut: int) -> None:
    """The seeded model says any bytes, so most of its characters are torn; the stop is one that it says late."""
    tested = pair("float32", eos=())
    text = text_of(run(tested.second, ask("whole", COUNT, sampling=SAMPLED)))
    request = ask("moved", COUNT, sampling=SAMPLED, stop=(text[-9:-3], "never said"))
    whole = run(tested.second, replace(request, id="stopped"))
    assert whole[-1].finish == "stop"
    events = moved(tested, request, min(cut, len(whole) - 1))
    assert [event.text for event in events] == [event.text for event in whole]
    assert events[-1].finish == "stop"


def test_log_probabilities_and_penalties_move_too(pair: Callable[..., Pair]) -> None:
    tested = pair("float32")
    sampling = replace(SAMPLED, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={7: 2.0})
    request = ask("moved", COUNT, sampling=sampling, logprobs=3)
    whole = run(tested.second, replace(request, id="whole"))
    events = moved(tested, request, 9)
    assert [event.token for event in events] == [event.token for event in whole]
    for mine, theirs in zip(events, whole, strict=True):
        assert (mine.logprobs is None) == (theirs.logprobs is None)
        if mine.logprobs and theirs.logprobs:
            assert mine.logprobs.token == pytest.approx(theirs.logprobs.token, abs=1e-4)
            assert [token for token, _ in mine.logprobs.top] == [token for token, _ in theirs.logprobs.top]


def test_where_the_pipe_is_slow_rows_are_made_anew(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the tokens are the same in float32; for a deterministic request rows travel nevertheless."""
    monkeypatch.setattr(Relay, "measure", lambda self: setattr(self, "speed", 1.0))
    tested = pair("float32")
    request = ask("moved", COUNT, sampling=SAMPLED, prompt=tiny.prompt_of(100))
    whole = run(tested.second, replace(request, id="whole"))
    run(tested.first, replace(request, id="warm", prompt=tiny.prompt_of(100, 3)))  # how fast prompts are is measured
    assert moved(tested, request, 9) == whole
    assert outcome(tested, "moved").how == "recompute"


def test_a_destination_that_stands_still_aborts_back_to_the_source(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "ANSWER", 0.2)
    tested = pair("bfloat16")
    tested.deaf = True
    request = ask("moved", COUNT, sampling=SAMPLED)
    whole = run(tested.second, replace(request, id="whole"))
    assert moved(tested, request, 9) == whole
    assert (outcome(tested, "moved").outcome, tested.released.is_set()) == ("back", False)


def test_the_engine_is_gone_when_all_has_moved(pair: Callable[..., Pair]) -> None:
    tested = pair("float32")
    stream = tested.live.submit(ask("moved", 150, sampling=SAMPLED))
    events = [next(stream)]
    tested.drain()
    assert tested.released.wait(20)
    assert not tested.first._thread.is_alive()
    events += list(stream)
    assert events[-1].finish in ("length", "stop")
    late = list(tested.live.submit(ask("late", COUNT)))
    assert late == run(tested.second, ask("again", COUNT))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_destination_that_dies_changes_no_bit(pair: Callable[..., Pair], dtype: str, sampling: Any) -> None:
    """The next destination computes all rows of the dead one again, token by token."""
    tested = pair(dtype, count=3)
    request = ask("moved", COUNT, sampling=sampling)
    whole = run(tested.further[0], replace(request, id="whole"))
    first, second = Gate(tested.first), Gate(tested.second)
    stream = tested.live.submit(request)
    events = first.read(stream, 5)
    tested.drain()
    events += second.read(stream, 13)
    tested.pipes[0].close("it is gone")
    second.open()
    events += list(stream)
    assert events == whole
    assert [told.outcome for told in tested.told] == ["moved", "moved"]
    assert tested.told[1].how == "recompute"


def test_what_no_destination_is_left_for_goes_on_here_while_the_model_is_here(pair: Callable[..., Pair]) -> None:
    tested = pair("float32")
    tested.releasable = False
    request = ask("moved", COUNT, sampling=SAMPLED)
    whole = run(tested.second, replace(request, id="whole"))
    first, second = Gate(tested.first), Gate(tested.second)
    stream = tested.live.submit(request)
    events = first.read(stream, 5)
    tested.drain()
    events += second.read(stream, 13)
    first.open()
    tested.pipes[0].close("it is gone")
    events += list(stream)
    second.open()
    assert events == whole
    assert not tested.released.is_set()
