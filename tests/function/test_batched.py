"""The batched engine on transformers' models: `generate`, neighbours, reuse, memory, failures, moves."""

from __future__ import annotations

import contextlib
import pickle
import random
import subprocess
import sys
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
    tiny,
    tokenizer,
    torch,
    until,
)

from runtime.engine.attention import Unbatchable, install, known, tried
from runtime.engine.base import GenerationRequest, KVRow, SamplingParams, TokenEvent
from runtime.engine.batched import BatchedEngine
from runtime.engine.loop import EngineWatch
from runtime.engine.serial import TokenizerCodec
from runtime.errors import BadRequest, EngineBusy, EngineFailed, SnapshotRefused

TOKEN = 2 * 2 * (8 + 8) * 4  # bytes of one token of the tiny models in float32: layers, heads, key and value, width


def batched(model: Any, **options: Any) -> BatchedEngine:
    options = {"memory": 64 << 20, "chunk": 16, "fixed": 4, "slots": 20, "queue_size": 40, "threads": 1, **options}
    return BatchedEngine(model, TokenizerCodec(tokenizer()), revision="tiny", **options)


def tokens(events: list[TokenEvent]) -> list[int | None]:
    return [event.token for event in events]


class TestGenerate:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_greedy_is_that_of_generate(self, architecture: str) -> None:
        """Alone and mixed, around the sliding window and the chunk, whatever the chunking."""
        model = tiny(architecture)
        prompts = [prompt_of(length, length) for length in (1, 15, 16, 17, 40, 100)]
        want = [greedy_reference(model, prompt, 30) for prompt in prompts]
        for chunk, reuse in ((512, True), (16, False), (7, True), (1, False)):
            with contextlib.closing(batched(model, chunk=chunk, reuse=reuse)) as engine:
                assert tokens(run(engine, ask(count=30, prompt=prompts[4]))) == want[4]
                streams = [engine.submit(ask(str(i), 30, prompt=prompt)) for i, prompt in enumerate(prompts)]
                assert [tokens(list(stream)) for stream in streams] == want

    def test_joining_and_leaving_at_any_step(self) -> None:
        model, chance = tiny("mistral"), random.Random(5)
        with contextlib.closing(batched(model, slots=6)) as engine:
            wants, streams = [], []
            for number in range(24):
                prompt, count = prompt_of(chance.randint(1, 60), number), chance.randint(1, 40)
                streams.append(engine.submit(ask(str(number), count, prompt=prompt)))
                wants.append(greedy_reference(model, prompt, count))
                if number % 5 == 4:
                    streams[chance.randrange(len(streams))].close()
            for stream, want in zip(streams, wants, strict=True):
                got = tokens(list(stream))
                assert got in (want, [])
            until(lambda: engine.stats().running == 0)
            assert engine.stats().memory == 0

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_raw_use_of_the_model_still_works(self, architecture: str) -> None:
        model = tiny(architecture)
        ids = torch.tensor([[0, 0, *PROMPT], prompt_of(22)])
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        want = model.generate(ids, **asked)
        install(model)
        assert torch.equal(model.generate(ids, **asked), want)

    def test_embedding_is_the_mean_of_hidden_states(self) -> None:
        model, prompt = tiny("mistral"), prompt_of(40)
        with torch.inference_mode():
            mean = model.base_model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        with contextlib.closing(batched(model, chunk=7)) as engine:
            assert engine.embed([prompt])[0] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
            assert engine.stats().memory == 0

    def test_logprobs_are_those_of_the_model(self) -> None:
        model = tiny("qwen2")
        with contextlib.closing(batched(model)) as engine:
            events = run(engine, ask(count=5, sampling=SAMPLED, logprobs=3))
        ids = torch.tensor([[*PROMPT, *(event.token for event in events)]])
        with torch.inference_mode():
            want = model(ids).logits[0, len(PROMPT) - 1 : -1].double().log_softmax(-1)
        for event, row in zip(events, want, strict=True):
            assert event.logprobs is not None
            assert event.logprobs.token == pytest.approx(row[event.token].item(), abs=1e-4)
            assert [token for token, _ in event.logprobs.top] == row.topk(3).indices.tolist()


def neighbours(chance: random.Random, count: int) -> list[GenerationRequest]:
    return [
        ask(
            f"n{number}",
            chance.randint(1, 50),
            prompt=prompt_of(chance.randint(1, 60), chance.randrange(1000)),
            sampling=replace(SAMPLED, seed=chance.randrange(1000)),
            deterministic=chance.random() < 0.3,
        )
        for number in range(count)
    ]


class TestNeighbours:
    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_sixteen_change_nothing(self, architecture: str, dtype: str, sampling: SamplingParams) -> None:
        """In float32 as it is; in bfloat16 for a request that asks for it, its log-probabilities to the last bit."""
        exact = dtype == "bfloat16"
        wanted = ask(
            count=40, prompt=prompt_of(37), sampling=sampling, deterministic=exact, logprobs=2 if exact else None
        )
        with contextlib.closing(batched(tiny(architecture, dtype))) as engine:
            alone = run(engine, wanted)
            for round_ in range(3):
                chance = random.Random(round_)
                others = [engine.submit(other) for other in neighbours(chance, chance.randint(1, 8))]
                among = engine.submit(wanted)
                others += [engine.submit(replace(other, id=other.id + "'")) for other in neighbours(chance, 8)]
                assert list(among) == alone
                for other in others:
                    other.close()

    def test_every_request_of_a_deterministic_function(self) -> None:
        requests = [replace(other, deterministic=False) for other in neighbours(random.Random(3), 16)]
        model = tiny("llama", "bfloat16")
        with contextlib.closing(batched(model, deterministic=True)) as engine:
            alone = [run(engine, request) for request in requests]
            streams = [engine.submit(request) for request in requests]
            assert [list(stream) for stream in streams] == alone


class TestReuse:
    def test_turns_of_a_conversation(self) -> None:
        model, said = tiny("llama"), prompt_of(30)
        with contextlib.closing(batched(model)) as engine:
            for turn in range(4):
                answer = tokens(run(engine, ask(count=20, prompt=said)))
                assert answer == greedy_reference(model, said, 20)
                said = (*said, *answer, *prompt_of(9, turn))  # type: ignore[arg-type]
                until(lambda turn=turn: engine.stats().cached > 0)  # type: ignore[misc]
            # All but the last token of each answer had been fed when the next turn came.
            assert engine.stats().reused == 49 + 78 + 107

    def test_requests_with_one_system_prompt(self) -> None:
        model, system = tiny("mistral"), prompt_of(48)
        with contextlib.closing(batched(model)) as engine:
            first = engine.submit(ask("first", 100, prompt=(*system, 1)))
            assert first.next(30.0) is not None
            for number in range(3):  # reused while the first one still runs
                prompt = (*system, *prompt_of(5, number))
                assert tokens(run(engine, ask(count=9, prompt=prompt))) == greedy_reference(model, prompt, 9)
            assert engine.stats().reused >= 3 * 48
            first.close()

    def test_deterministic_requests_reuse_only_what_is_exact(self) -> None:
        with contextlib.closing(batched(tiny("llama", "bfloat16"))) as engine:
            prompt = prompt_of(60)
            wanted = ask(count=20, prompt=prompt, deterministic=True)
            run(engine, ask("rough", 9, prompt=prompt[:50]))
            alone = run(engine, wanted)
            assert engine.stats().reused == 0
            until(lambda: engine.stats().cached > 0)
            assert run(engine, wanted) == alone
            assert engine.stats().reused == 48

    def test_kept_rows_give_way(self) -> None:
        memory = 100 * TOKEN
        with contextlib.closing(batched(tiny("llama"), memory=memory)) as engine:
            for seed in range(5):
                run(engine, ask(count=20, prompt=prompt_of(30, seed)))
                assert engine.stats().cached <= memory
            until(lambda: engine.stats().cached > 0)
            with engine.submit(ask(count=60, prompt=prompt_of(40, 9))):
                until(lambda: engine.stats().cached == 0)

    def test_off(self) -> None:
        with contextlib.closing(batched(tiny("llama"), reuse=False)) as engine:
            assert run(engine, ask()) == run(engine, ask())
            assert (engine.stats().cached, engine.stats().reused) == (0, 0)


class TestMemory:
    def test_who_does_not_fit_waits(self) -> None:
        with contextlib.closing(batched(tiny("llama"), memory=100 * TOKEN, slots=4, queue_size=3)) as engine:
            streams = [engine.submit(ask(str(number), 30)) for number in range(7)]  # 50 tokens each: two at once
            with pytest.raises(EngineBusy):
                engine.submit(ask("one too many", 30))
            most = 0
            for stream in streams:
                last = None
                for last in stream:  # noqa: B007
                    stats = engine.stats()
                    most = max(most, stats.running)
                    assert stats.memory + stats.cached <= stats.memory_limit
                assert last is not None
                assert last.finish == "length"
            assert most == 2

    def test_what_never_fits_is_refused(self) -> None:
        with contextlib.closing(batched(tiny("llama"), memory=100 * TOKEN)) as engine:
            with pytest.raises(BadRequest, match="holds those of 100") as refused:
                engine.submit(ask(count=90))
            assert refused.value.param == "max_tokens"
            assert run(engine, ask(count=80))[-1].finish == "length"

    def test_a_move_needs_memory_at_once(self) -> None:
        with contextlib.closing(batched(tiny("llama"), memory=100 * TOKEN, slots=4)) as engine:
            stream = engine.submit(ask(count=70))
            assert stream.next(30.0) is not None
            state = engine.export("a")
            with pytest.raises(EngineBusy, match="memory"):
                engine.admit(replace(state, request=replace(state.request, id="b")))
            engine.forget("a")
            assert list(engine.admit(state))[-1].finish == "length"


class TestFailures:
    def test_scores_that_are_no_numbers_harm_one_request(self) -> None:
        model = tiny("llama")
        model.model.embed_tokens.weight.data[200] = torch.nan
        with contextlib.closing(batched(model, slots=4)) as engine:
            want = run(engine, ask())
            good, bad = engine.submit(ask("good")), engine.submit(ask("bad", prompt=(5, 200, 7)))
            assert "finite" in (list(bad)[-1].error or "")
            assert list(good) == want

    def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(self, caplog: pytest.LogCaptureFixture) -> None:
        model = tiny("llama")
        with contextlib.closing(batched(model, memory=4 << 20)) as engine:
            want = run(engine, ask())
            hook = model.model.layers[1].register_forward_pre_hook(_raise)
            streams = [engine.submit(ask(name)) for name in "ab"]
            for stream in streams:
                last = list(stream)[-1]
                assert (last.finish, last.token) == ("error", None)
                assert "RuntimeError" in (last.error or "")
                assert "secret" not in (last.error or "")
            hook.remove()
            assert run(engine, ask()) == want
            assert engine.stats().memory == 0

    def test_an_engine_that_only_fails_gives_up(self) -> None:
        model, told = tiny("llama"), []
        with contextlib.closing(batched(model, watch=EngineWatch(broken=told.append))) as engine:
            model.model.layers[1].register_forward_pre_hook(_raise)
            for number in range(3):
                assert list(engine.submit(ask(str(number))))[-1].finish == "error"
            until(lambda: bool(told))
            assert "RuntimeError" in told[0]
            with pytest.raises(EngineFailed):
                engine.submit(ask())


def _raise(*_: object) -> None:
    raise RuntimeError("secret detail")


class TestInstall:
    def test_a_model_with_an_attention_of_its_own_is_left_as_it_was(self) -> None:
        import transformers

        for config, why in (
            (
                transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4),
                "does not take its attention",
            ),
            (
                transformers.Gemma2Config(
                    hidden_size=16,
                    num_hidden_layers=2,
                    vocab_size=32,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    intermediate_size=16,
                ),
                "caps its attention scores",
            ),
        ):
            model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            before = model.config._attn_implementation
            with pytest.raises(Unbatchable, match=why):
                install(model)
            assert model.config._attn_implementation == before

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_shape(self, architecture: str) -> None:
        shape = install(tiny(architecture))
        heads = 4 if architecture == "gpt2" else 2
        assert (shape.layers, shape.heads, shape.key, shape.value) == (2, heads, 8, 8)
        assert shape.token_bytes == TOKEN * heads // 2

    @pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("more", [{}, {"head_dim": 24}, {"num_key_value_heads": 1}])
    def test_what_is_known_of_a_class_is_what_trying_finds(self, architecture: str, more: dict[str, int]) -> None:
        import transformers

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.AutoConfig.for_model(
            architecture, vocab_size=32, intermediate_size=16, pad_token_id=None, **{**sizes, **more}
        )
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        found = known(model)
        assert found is not None
        assert found == tried(model)


class TestMoving:
    def test_damaged_rows_are_refused(self) -> None:
        with contextlib.closing(batched(tiny("mistral"))) as engine:
            stream = engine.submit(ask(count=200))
            next(iter(stream))
            state = engine.export("a")
            engine.forget("a")
            rows = {row.name: row for row in state.kv}
            layer = rows["0"]
            for damaged in (
                replace(layer, dtype="bfloat16"),
                replace(layer, shape=(1, *layer.shape[1:])),
                replace(layer, data=layer.data[1:]),
                replace(layer, name="9"),
                KVRow("fed", "int64", (), b"\xff" * 8),
                KVRow("fed", "int64", (), b"\0" * 8),
                KVRow("fed", "int64", (), b""),
                KVRow("exact", "int64", (), b"\x7f" * 8),
            ):
                kv = tuple({**rows, ("0" if damaged.name == "9" else damaged.name): damaged}.values())
                with pytest.raises(SnapshotRefused):
                    engine.admit(replace(state, kv=kv))
            assert engine.stats().running + engine.stats().waiting + engine.stats().memory == 0
            assert list(engine.admit(state))[-1].finish == "length"

    def test_deterministic_requests_stay_with_their_arithmetic(self) -> None:
        model = tiny("llama", "bfloat16")
        with contextlib.closing(batched(model)) as source, contextlib.closing(batched(model, fixed=5)) as target:
            stream = source.submit(ask(count=50, deterministic=True))
            next(iter(stream))
            state = source.export("a")
            with pytest.raises(SnapshotRefused, match=r"4 rows.*5 rows"):
                target.admit(state)
            source.forget("a")
            with contextlib.closing(batched(model, slots=1)) as alike:
                assert list(alike.admit(state))[-1].finish == "length"

    def test_the_same_continuation_in_another_process(self, tmp_path: Path) -> None:
        """Each state without its rows, and with them: in this order, so that none are there to be reused."""
        moves, wants = [], []
        for architecture in ARCHITECTURES:
            for dtype, exact in (("float32", False), ("bfloat16", True)):
                with contextlib.closing(batched(tiny(architecture, dtype))) as engine:
                    for sampling in (GREEDY, SAMPLED):
                        wanted = ask(count=40, sampling=sampling, deterministic=exact)
                        want = tokens(run(engine, wanted))
                        others = [engine.submit(other) for other in neighbours(random.Random(4), 6)]
                        for event in engine.submit(wanted):
                            if event.index == 9:
                                break
                        states = [engine.export("a", kv=kv) for kv in (False, True)]
                        engine.forget("a")
                        for other in others:
                            other.close()
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

    def test_ten_moves_of_one_stream(self) -> None:
        model = tiny("qwen2", "bfloat16")
        with contextlib.closing(batched(model)) as one, contextlib.closing(batched(model)) as two:
            wanted = ask(count=60, sampling=SAMPLED, deterministic=True)
            want = run(one, wanted)
            got: list[TokenEvent] = []
            stream, here, there = one.submit(wanted), one, two
            for _ in range(10):
                while (event := stream.next(0.0)) is not None or not got:
                    got += [event] if event else []
                if got[-1].finish:
                    break
                state = here.export("a")
                while (event := stream.next(0.0)) is not None:
                    got.append(event)
                stream = there.admit(state)
                here.forget("a")
                here, there = there, here
            got += list(stream) if not got[-1].finish else []
            assert got == want


def continue_all(path: Path) -> None:
    """What the other process does: admits every state among neighbours, and writes down the tokens."""
    found = []
    for architecture, dtype, states in pickle.loads(path.read_bytes()):
        with contextlib.closing(batched(tiny(architecture, dtype))) as engine:
            found.append([])
            for state in states:
                others = [engine.submit(other) for other in neighbours(random.Random(8), 9)]
                found[-1].append(tokens(list(engine.admit(state))))
                for other in others:
                    other.close()
    path.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    continue_all(Path(sys.argv[1]))
