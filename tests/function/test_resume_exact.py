"""Exactness of resumption from tokens alone: tiny models, two engines, bytes in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
from tiny import GREEDY, SAMPLED, ask, run, text_of

from runtime.engine.base import STATE_VERSION, GenerationState, TokenEvent
from runtime.engine.batched import BatchedEngine
from runtime.engine.serial import TokenizerCodec
from runtime.resume import record, resumption
from runtime.resume.record import AnswerContext
from runtime.resume.snapshot import ReplicaIdentity, Snapshot, check

COUNT = 40


@pytest.fixture(params=["float32", "bfloat16"])
def engines(request: Any) -> Iterator[tuple[BatchedEngine, BatchedEngine]]:
    """Two replicas of a model; bfloat16 is exact for deterministic requests alone."""
    made = []
    for _ in range(2):
        codec = TokenizerCodec(tiny.tokenizer(), [0])
        model = tiny.tiny("llama", request.param)
        deterministic = request.param == "bfloat16"
        made.append(BatchedEngine(model, codec, revision="r", memory=64 << 20, deterministic=deterministic, threads=1))
    yield made[0], made[1]
    for engine in made:
        engine.close()


@pytest.mark.parametrize("neighbours", [0, 3], ids=["alone", "among neighbours"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cut", [1, 7, 31])
def test_the_tokens_and_texts_of_the_uninterrupted_run(
    engines: tuple[BatchedEngine, BatchedEngine], neighbours: int, sampling: Any, cut: int
) -> None:
    first, second = engines
    request = ask("chatcmpl-0123456789abcdef-0", COUNT, sampling=sampling)
    whole = run(first, replace(request, id="whole"))
    place = ReplicaIdentity("batched", "r", "t", "", first.arithmetic)
    kept = Snapshot(GenerationState(STATE_VERSION, "batched", "r", request, (), 0), "t")
    tokens = [event.token for event in whole[:cut]]
    pieces = [
        record.opening(AnswerContext("chat", "chatcmpl-0123456789abcdef"), [kept]),
        record.progress({0: (0, tokens)}),
    ]
    (choice,) = record.assemble(pieces).choices
    check(choice, place)
    others = [
        second.submit(ask(f"other-{n}", COUNT, prompt=tiny.prompt_of(20 + 30 * n, n), sampling=SAMPLED))
        for n in range(neighbours)
    ]
    told = cut // 2
    events = resumption._replayed(choice.state.request, choice.state.generated, second.codec)
    stream = resumption._continued(second, choice, events, told, 0.0)
    rest: list[TokenEvent] = list(_all(stream))
    assert [event.token for event in rest] == [event.token for event in whole[told:]]
    assert [event.text for event in rest] == [event.text for event in whole[told:]]
    assert text_of(whole[:told]) + text_of(rest) == text_of(whole)
    assert rest[-1].finish == whole[-1].finish
    for other in others:
        other.close()


def _all(stream: Any) -> Iterator[TokenEvent]:
    while True:
        event = stream.next(10.0)
        if event is not None:
            yield event
            if event.finish is not None:
                return
