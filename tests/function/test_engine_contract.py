"""The engine contract, on every engine that keeps it; and for transformers' models, the tokens of `generate`."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import (
    ARCHITECTURES,
    GREEDY,
    PROMPT,
    SAMPLED,
    ask,
    greedy_reference,
    prompt_of,
    run,
    text_of,
    tiny,
    tokenizer,
    torch,
    until,
)

from runtime.engine.base import Engine, GenerationState, KVRow, SamplingParams
from runtime.engine.batched import BatchedEngine
from runtime.engine.serial import SerialEngine, TokenizerCodec
from runtime.engine.toy import ToyEngine
from runtime.errors import BadRequest, EngineBusy, EngineFailed, SnapshotRefused


def serial(model: Any, **options: Any) -> SerialEngine:
    return SerialEngine(model, TokenizerCodec(tokenizer()), revision="tiny", threads=1, **options)


Make = Callable[..., Engine]


@pytest.fixture(params=["toy", "serial", "batched", "deterministic"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes engines of one kind whose steps take at least `step_delay` seconds."""
    model = None if request.param == "toy" else tiny("llama")
    with contextlib.ExitStack() as stack:

        def engine(step_delay: float = 0.0, **options: Any) -> Engine:
            made: Engine
            if request.param == "toy":
                made = ToyEngine(step_delay=step_delay, revision="tiny", context_length=256, **options)
            elif request.param == "serial":
                made = Slowed(model, step_delay, **options)
            else:
                made = SlowedBatch(model, step_delay, deterministic=request.param == "deterministic", **options)
            stack.callback(made.close)
            return made

        yield engine


class Slowed(SerialEngine):
    def __init__(self, model: Any, delay: float, **options: Any) -> None:
        self.delay = delay
        super().__init__(model, TokenizerCodec(tokenizer()), revision="tiny", threads=1, **options)

    def step(self, rows: Any) -> Any:
        time.sleep(self.delay)
        return super().step(rows)


class SlowedBatch(BatchedEngine):
    def __init__(self, model: Any, delay: float, **options: Any) -> None:
        self.delay = delay
        options = {"memory": 8 << 20, "slots": 4, "queue_size": 16, "chunk": 16, "fixed": 4, **options}
        super().__init__(model, TokenizerCodec(tokenizer()), revision="tiny", threads=1, **options)

    def step(self, rows: Any) -> Any:
        time.sleep(self.delay)
        return super().step(rows)


class TestContract:
    def test_events(self, make: Make) -> None:
        engine = make()
        events = run(engine, ask())
        assert [event.index for event in events] == list(range(24))
        assert [event.finish for event in events] == [None] * 23 + ["length"]
        assert engine.codec.decode([event.token for event in events]) == text_of(events)  # type: ignore[attr-defined]
        assert run(engine, ask()) == events
        assert engine.stats().running == engine.stats().waiting == 0

    def test_stop_string_and_stop_id(self, make: Make) -> None:
        engine = make()
        events = run(engine, ask())
        text = text_of(events)
        stopped = run(engine, ask(stop=(text[5:8],)))
        assert text_of(stopped) == text[: text.index(text[5:8])]
        assert stopped[-1].finish == "stop"
        stop_id = events[9].token
        stopped = run(engine, ask(stop_ids=frozenset({stop_id})))
        assert [event.token for event in stopped] == [e.token for e in events][: len(stopped)]
        assert (stopped[-1].token, stopped[-1].finish) == (stop_id, "stop")

    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    def test_neighbours_change_nothing(self, make: Make, sampling: SamplingParams) -> None:
        engine = make(slots=3, queue_size=16)
        alone = run(engine, ask(sampling=sampling))
        streams = [
            engine.submit(ask(f"n{i}", prompt=prompt_of(5 + 9 * i, seed=i), count=9 + 5 * i, sampling=sampling))
            for i in range(5)
        ]
        among = engine.submit(ask(sampling=sampling))
        assert list(among) == alone
        for stream in streams:
            assert list(stream)[-1].finish == "length"
        other = run(engine, ask(sampling=replace(sampling, seed=12)))
        assert (other == alone) == (sampling == GREEDY)

    def test_cancel_running_and_waiting(self, make: Make) -> None:
        engine = make(slots=1, step_delay=0.01)
        running, waiting = engine.submit(ask("a", 200)), engine.submit(ask("b", 200))
        next(iter(running))
        engine.cancel("b")
        assert [event.finish for event in waiting] == ["cancelled"]
        running.close()
        engine.cancel("a")
        until(lambda: engine.stats().running == 0)
        assert list(running) == []
        assert run(engine, ask("a", 3))[-1].finish == "length"
        engine.cancel("unheard of")

    def test_closing_an_old_stream_spares_a_new_one(self, make: Make) -> None:
        engine = make(step_delay=0.005)
        old = engine.submit(ask(count=2))
        until(lambda: engine.stats().running + engine.stats().waiting == 0)
        new = engine.submit(ask(count=30))
        old.close()
        assert list(new)[-1].finish == "length"

    def test_next_has_a_timeout(self, make: Make) -> None:
        engine = make(step_delay=0.1)
        stream = engine.submit(ask(count=1))
        assert stream.next(0.0) is None
        assert stream.next(0.01) is None
        event = stream.next(10.0)
        assert event is not None
        assert event.finish == "length"
        with pytest.raises(StopIteration):
            stream.next(0.0)

    def test_busy(self, make: Make) -> None:
        engine = make(slots=1, queue_size=1, step_delay=0.01)
        streams = [engine.submit(ask(name, 100)) for name in "ab"]
        with pytest.raises(EngineBusy) as busy:
            engine.submit(ask("c"))
        assert busy.value.retry_after >= 1
        for stream in streams:
            stream.close()
        assert run(engine, ask("c", 2))[-1].finish == "length"

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"prompt": ()}, "prompt"),
            ({"prompt": (5, 400)}, "prompt"),
            ({"prompt": (5, -1)}, "prompt"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 237}, "max_tokens"),
            ({"prompt": (5,) * 256}, "prompt"),
            ({"sampling": SamplingParams(logit_bias={400: 1})}, "logit_bias"),
        ],
    )
    def test_bad_requests(self, make: Make, change: dict[str, Any], param: str) -> None:
        engine = make()
        with pytest.raises(BadRequest) as refused:
            engine.submit(ask(**change))
        assert refused.value.param == param

    def test_one_id_once(self, make: Make) -> None:
        engine = make(step_delay=0.01)
        with engine.submit(ask(count=100)), pytest.raises(EngineBusy, match="live already"):  # type: ignore[attr-defined]
            engine.submit(ask())

    def test_the_whole_context(self, make: Make) -> None:
        assert run(make(), ask(count=236))[-1].finish == "length"

    def test_export_then_resume(self, make: Make) -> None:
        engine = make(step_delay=0.005)
        want = run(engine, ask(sampling=SAMPLED))
        stream = engine.submit(ask(sampling=SAMPLED))
        first = [event for _, event in zip(range(5), stream, strict=False)]
        state = engine.export("a")
        assert engine.export("a") == state
        while (event := stream.next(0.0)) is not None:
            first.append(event)
        assert [event.token for event in first] == list(state.generated)
        assert state.emitted == len(text_of(first))
        assert stream.next(0.05) is None
        engine.resume("a")
        assert first + list(stream) == want
        with pytest.raises(KeyError):
            engine.export("a")
        engine.resume("a")
        engine.forget("a")

    @pytest.mark.parametrize("kv", [True, False])
    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    def test_export_then_admit_elsewhere(self, make: Make, kv: bool, sampling: SamplingParams) -> None:
        source, target = make(step_delay=0.003), make()
        want = run(source, ask(sampling=sampling))
        for cut in (1, 7, 20):
            stream = source.submit(ask(sampling=sampling))
            while (event := stream.next(10.0)) is not None and event.index < cut - 1:
                pass
            state = source.export("a", kv=kv)
            neighbour = target.submit(ask("n", 100, prompt=prompt_of(40, 3)))
            moved = target.admit(pickle.loads(pickle.dumps(state)))
            source.forget("a")
            assert list(moved) == want[len(state.generated) :]
            assert list(stream)[-1].finish == "moved"
            neighbour.close()
        until(lambda: source.stats().running == 0)

    def test_export_of_one_that_waits(self, make: Make) -> None:
        engine = make(slots=1, step_delay=0.01)
        with engine.submit(ask("b", 200)):  # type: ignore[attr-defined]
            engine.submit(ask())
            state = engine.export("a")
            engine.forget("a")
        assert (state.generated, state.emitted, state.kv) == ((), 0, ())
        assert list(engine.admit(state)) == run(engine, ask())

    def test_admit_needs_a_slot_and_a_free_id(self, make: Make) -> None:
        engine = make(slots=1, queue_size=5, step_delay=0.01)
        engine.submit(ask(count=60))
        state = engine.export("a")
        engine.resume("a")
        with pytest.raises(EngineBusy):
            engine.admit(replace(state, request=ask("b", 200)))
        engine.cancel("a")
        assert list(engine.admit(state))[-1].finish == "length"

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"engine": "other"},
            {"revision": "other"},
            {"emitted": 999},
            {"generated": (5,) * 24},
            {"request": ask(prompt=(400,))},
            {"request": ask(count=300)},
        ],
    )
    def test_snapshots_of_others_are_refused(self, make: Make, change: dict[str, Any]) -> None:
        engine = make()
        state = GenerationState(1, engine.kind, "tiny", ask(), (5,), 0)
        with pytest.raises(SnapshotRefused):
            engine.admit(replace(state, **change))
        assert engine.stats().running + engine.stats().waiting == 0

    def test_close_ends_everything(self, make: Make) -> None:
        engine = make(slots=1, step_delay=0.01)
        streams = [engine.submit(ask(name, 200)) for name in "ab"]
        next(iter(streams[0]))
        engine.close()
        for stream in streams:
            last = list(stream)[-1]
            assert (last.finish, last.token) == ("error", None)
            assert "shutting down" in (last.error or "")
        with pytest.raises(EngineFailed):
            engine.submit(ask("c"))
        engine.close()

    def test_many_threads_at_once(self, make: Make) -> None:
        engine = make(slots=3, queue_size=40)
        want = run(engine, ask(count=8))
        got: dict[int, Any] = {}

        def client(number: int) -> None:
            stream = engine.submit(ask(f"t{number}", 8))
            if number % 3 == 0:
                stream.close()
            elif number % 3 == 1:
                with contextlib.suppress(KeyError):
                    engine.export(f"t{number}", kv=False)
                engine.resume(f"t{number}")
            got[number] = list(stream)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert all(got[number] == (want if number % 3 else []) for number in range(24))
        until(lambda: engine.stats().running + engine.stats().waiting == 0)

    def test_embed(self, make: Make) -> None:
        engine = make()
        long, short, again = engine.embed([prompt_of(200), prompt_of(7), prompt_of(7)])
        assert short == again != long
        assert sum(x * x for x in long) == pytest.approx(1, abs=1e-5)


class TestTransformers:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_greedy_is_that_of_generate(self, architecture: str) -> None:
        """Prompts around the sliding window and the chunk, several at once, whatever the chunking."""
        model = tiny(architecture)
        prompts = [prompt_of(length, length) for length in (1, 15, 16, 17, 40)]
        want = [greedy_reference(model, prompt, 30) for prompt in prompts]
        for chunk in (512, 16, 7):
            with contextlib.closing(serial(model, chunk=chunk, slots=5)) as engine:
                streams = [engine.submit(ask(str(i), 30, prompt=prompt)) for i, prompt in enumerate(prompts)]
                assert [[event.token for event in stream] for stream in streams] == want

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_bf16_greedy_is_that_of_generate(self, architecture: str) -> None:
        model = tiny(architecture, "bfloat16")
        with contextlib.closing(serial(model)) as engine:
            got = [event.token for event in run(engine, ask(count=30))]
        assert got == greedy_reference(model, PROMPT, 30)

    def test_repetition_penalty_is_that_of_generate(self) -> None:
        model = tiny("llama")
        ids = torch.tensor([PROMPT])
        out = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, repetition_penalty=1.3)
        with contextlib.closing(serial(model)) as engine:
            got = run(engine, ask(count=30, sampling=replace(GREEDY, repetition_penalty=1.3)))
        assert [event.token for event in got] == out[0, 20:].tolist()

    def test_embedding_is_the_mean_of_hidden_states(self) -> None:
        model, prompt = tiny("mistral"), prompt_of(40)
        with torch.inference_mode():
            mean = model.base_model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        with contextlib.closing(serial(model, chunk=7)) as engine:
            assert engine.embed([prompt])[0] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)

    def test_long_prompts_stall_nobody(self) -> None:
        with contextlib.closing(serial(tiny("llama"), chunk=8)) as engine:
            long = engine.submit(ask("long", 2, prompt=prompt_of(200)))
            short = run(engine, ask("short", 5))
            assert short[-1].finish == "length"
            assert long.next(0.0) is None
            assert list(long)[-1].finish == "length"

    def test_a_failing_step_fails_its_request_alone(self, caplog: pytest.LogCaptureFixture) -> None:
        class Fragile(SerialEngine):
            def step(self, rows: Any) -> Any:
                if rows[0].generation.request.id == "bad" and rows[0].generation.generated:
                    raise RuntimeError("secret detail")
                return super().step(rows)

        engine = Fragile(tiny("llama"), TokenizerCodec(tokenizer()), revision="tiny", threads=1)
        with contextlib.closing(engine):
            good, bad = engine.submit(ask("good")), engine.submit(ask("bad"))
            last = list(bad)[-1]
            assert (last.finish, last.token) == ("error", None)
            assert "RuntimeError" in (last.error or "")
            assert "secret" not in (last.error or "")
            assert "secret" in caplog.text
            assert [event.token for event in good] == [event.token for event in run(engine, ask())]
            assert engine.stats().running == 0

    def test_a_broken_engine_says_so(self) -> None:
        class Broken(SerialEngine):
            def choose(self, rows: Any) -> Any:
                raise SystemError("bug")

        engine = Broken(tiny("llama"), TokenizerCodec(tokenizer()), revision="tiny", threads=1)
        assert [event.finish for event in engine.submit(ask())] == ["error"]
        for call in (lambda: engine.submit(ask()), lambda: engine.embed([(5,)])):
            with pytest.raises(EngineFailed, match="SystemError"):
                call()
        engine.close()

    def test_damaged_caches_are_refused(self) -> None:
        with contextlib.closing(serial(tiny("mistral"))) as engine:
            stream = engine.submit(ask(count=200))
            next(iter(stream))
            state = engine.export("a")
            engine.forget("a")
            rows = {row.name: row for row in state.kv}
            key = rows["0.k"]
            assert key.shape == (1, 2, 15, 8)
            for damaged in (
                replace(key, dtype="bfloat16"),
                replace(key, shape=(1, 2, 14, 8)),
                replace(key, data=key.data[1:]),
                replace(key, name="9.k"),
                KVRow("fed", "int64", (), b"\xff" * 8),
                KVRow("fed", "int64", (), b"\0" * 8),
                KVRow("fed", "int64", (), b""),
            ):
                kv = tuple({**rows, ("0.k" if damaged.name == "9.k" else damaged.name): damaged}.values())
                with pytest.raises(SnapshotRefused):
                    engine.admit(replace(state, kv=kv))
            assert engine.stats().running + engine.stats().waiting == 0
            assert list(engine.admit(state))[-1].finish == "length"


class TestOtherProcess:
    """A generation moves into another process, in the middle of a batch."""

    def test_the_same_continuation(self, tmp_path: Path) -> None:
        moves, wants = [], []
        for architecture in ARCHITECTURES:
            for dtype, with_and_without in (("float32", (False, True)), ("bfloat16", (True,))):
                model = tiny(architecture, dtype)
                with contextlib.closing(serial(model)) as engine:
                    for sampling in (GREEDY, SAMPLED):
                        want = [event.token for event in run(engine, ask(count=40, sampling=sampling))]
                        neighbour = engine.submit(ask("n", 200))
                        stream = engine.submit(ask(count=40, sampling=sampling))
                        for event in stream:
                            if event.index == 9:
                                break
                        states = [engine.export("a", kv=kv) for kv in with_and_without]
                        engine.forget("a")
                        neighbour.close()
                        moves.append((architecture, dtype, states))
                        wants.append(want)
        file = tmp_path / "states"
        file.write_bytes(pickle.dumps(moves))
        subprocess.run([sys.executable, __file__, str(file)], check=True, timeout=110)
        for (architecture, dtype, moved), want, found in zip(
            moves, wants, pickle.loads(file.read_bytes()), strict=True
        ):
            for state, got in zip(moved, found, strict=True):
                case = architecture, dtype, state.request.sampling, bool(state.kv)
                assert list(state.generated) + got == want, case


def continue_all(path: Path) -> None:
    """What the other process does: admits every state next to a neighbour, and writes down the tokens."""
    tokens: list[list[list[int | None]]] = []
    for architecture, dtype, states in pickle.loads(path.read_bytes()):
        with contextlib.closing(serial(tiny(architecture, dtype))) as engine:
            tokens.append([])
            for state in states:
                neighbour = engine.submit(ask("n", 200, prompt=prompt_of(33, 5)))
                tokens[-1].append([event.token for event in engine.admit(state)])
                neighbour.close()
    path.write_bytes(pickle.dumps(tokens))


if __name__ == "__main__":
    continue_all(Path(sys.argv[1]))
