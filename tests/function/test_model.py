"""`context.model`: what handlers may ask, on the toy."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.base import SamplingParams
from runtime.errors import BadRequest, EngineBusy, EngineFailed, Unsupported
from runtime.function.model import DEFAULT_MAX_TOKENS, Model, Usage
from runtime.function.testing import toy_model
from runtime.protocol.parameters import Parameters, check, sampling_defaults

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture
def model() -> Iterator[Model]:
    model = toy_model()
    with contextlib.closing(model.engine):
        yield model


class TestGenerate:
    def test_prompt_and_messages(self, model: Model) -> None:
        assert model.generate("one two", max_tokens=12) == " one two one"
        assert model.generate(list(b"one two"), max_tokens=12) == " one two one"
        assert model.generate(messages=[{"role": "user", "content": "Hi there"}]) == "Hi there"

    def test_stream(self, model: Model) -> None:
        text = model.generate("grüße", stream=True, max_tokens=8, request_id="mine")
        assert (text.request_id, text.finish_reason, text.usage) == ("mine", None, Usage(7, 0))
        assert list(text) == [" ", "g", "r", "ü", "ß", "e"]
        assert (text.finish_reason, text.usage) == ("length", Usage(7, 8))
        assert list(text) == []

    def test_closing_cancels(self, model: Model) -> None:
        with model.generate("x", stream=True, max_tokens=4000) as text:
            next(text)
        assert text.finish_reason == "cancelled"
        assert list(text) == []
        assert model.engine.stats().running == 0

    def test_one_seed_one_text(self, model: Model) -> None:
        texts = {model.generate("a b c d e f", temperature=1, seed=3, max_tokens=40) for _ in range(3)}
        assert len(texts) == 1
        assert len({model.generate("a b c d e f", temperature=1, max_tokens=40) for _ in range(4)}) > 1

    def test_defaults(self, model: Model) -> None:
        text = model.generate("x", stream=True)
        assert (len(text.text()), text.finish_reason) == (DEFAULT_MAX_TOKENS, "length")
        nearly_full = model.generate("x" * 4090, stream=True)
        nearly_full.text()
        assert nearly_full.usage.completion_tokens == 6
        greedy = Model("m", "r", model.codec, model.engine, defaults=SamplingParams(0.0))
        assert greedy.generate("b a", max_tokens=4) == " b a"

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            ({}, "prompt"),
            ({"prompt": "a", "messages": []}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": [1, 2.5]}, "prompt"),
            ({"prompt": [300]}, "prompt"),
            ({"prompt": "\ud800"}, "prompt"),
            ({"prompt": "x" * 5000}, "prompt"),
            ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
            ({"messages": [{"role": "user"}]}, "messages"),
            ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
            ({"prompt": "x", "temprature": 1}, "temprature"),
            ({"prompt": "x", "temperature": "hot"}, "temperature"),
            ({"prompt": "x", "temperature": True}, "temperature"),
            ({"prompt": "x", "temperature": float("nan")}, "temperature"),
            ({"prompt": "x", "temperature": 10**400}, "temperature"),
            ({"prompt": "x", "min_p": -1}, "min_p"),
            ({"prompt": "x", "top_k": -1}, "top_k"),
            ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
            ({"prompt": "x", "logit_bias": {"1": 2}}, "logit_bias"),
            ({"prompt": "x", "logit_bias": [1]}, "logit_bias"),
            ({"prompt": "x", "logit_bias": {260: 2}}, "logit_bias"),
            ({"prompt": "x", "stop": [""]}, "stop"),
            ({"prompt": "x", "stop": 3}, "stop"),
            ({"prompt": "x", "stop_ids": "ab"}, "stop_ids"),
            ({"prompt": "x", "ignore_eos": 1}, "ignore_eos"),
        ],
    )
    def test_refuses_by_name(self, model: Model, asked: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as refused:
            model.generate(**asked)
        assert refused.value.param == param
        assert refused.value.text.isprintable()

    def test_busy_and_broken(self) -> None:
        model = toy_model(slots=1, queue_size=0, step_delay=0.02)
        first = model.generate("x", stream=True)
        with pytest.raises(EngineBusy):
            model.generate("x")
        model.engine.close()
        with pytest.raises(EngineFailed, match="shutting down"):
            first.text()
        with pytest.raises(EngineFailed, match="shutting down"):
            model.generate("x")


class TestCheck:
    def test_only_what_was_given(self) -> None:
        assert check({"temperature": None}) == Parameters()
        got = check({"temperature": 1, "max_tokens": 5, "stop": "a", "stop_ids": [3], "ignore_eos": True})
        assert got == Parameters({"temperature": 1.0}, 5, ("a",), frozenset({3}), True)

    @given(
        st.dictionaries(
            st.sampled_from(["temperature", "top_p", "top_k", "seed", "stop", "stop_ids", "logit_bias", "other"]),
            st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers() | st.text()),
        )
    )
    def test_anything_else_is_a_bad_request(self, given: dict[str, object]) -> None:
        param = next(iter(given), None)
        try:
            SamplingParams(**check(given).sampling)
        except BadRequest as error:
            param = error.param
        assert param is None or param in given

    def test_checkpoints_have_their_say(self) -> None:
        assert sampling_defaults({}) == SamplingParams()
        config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 2, "min_p": None}
        assert sampling_defaults(config) == SamplingParams(0.6, 20, 0.9)
        assert sampling_defaults({"do_sample": False, "temperature": 0.6}) == SamplingParams(0.0)
        assert sampling_defaults({"top_p": 7, "temperature": "x"}) == SamplingParams()


class TestRest:
    def test_embed(self, model: Model) -> None:
        a, b, c = model.embed(["warm start", "START warm", list(b"cold")])
        assert a == pytest.approx(b)
        assert a != pytest.approx(c)
        assert sum(x * x for x in c) == pytest.approx(1)
        for wrong in (["", "a"], ["x" * 5000], [[260]]):
            with pytest.raises(BadRequest):
                model.embed(wrong)
        with pytest.raises(BadRequest, match="list of texts"):
            model.embed("one text")

    def test_tokenizer(self, model: Model) -> None:
        assert model.tokenizer.decode(model.tokenizer.encode("é")) == "é"

    def test_raw_is_guarded(self, model: Model) -> None:
        with pytest.raises(Unsupported, match="GLOWPLUG_MODEL"):
            _ = model.raw
        reads: list[int] = []
        guarded = Model("m", "r", model.codec, model.engine, raw="raw", raw_guard=lambda: reads.append(1))
        assert (guarded.raw, reads) == ("raw", [1])


def test_the_cold_path_imports_nothing_heavy() -> None:
    code = (
        "import sys, runtime.http.routes; from runtime.function.testing import toy_model;"
        "toy_model().generate('x', max_tokens=3);"
        "assert not {'numpy', 'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
