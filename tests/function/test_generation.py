"""Sampling, detokenising and stopping, each against an oracle that is too slow or too simple to ship."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.base import GenerationRequest, SamplingParams
from runtime.engine.generation import Detokeniser, Generation, StopMatcher, gumbel, penalise, sample, survivors
from runtime.engine.toy import EOS, ToyCodec

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

CODEC = ToyCodec()


class TestNoise:
    def test_follows_from_seed_and_position_alone(self) -> None:
        assert np.array_equal(gumbel(3, 7, 100), gumbel(3, 7, 100))
        assert np.array_equal(gumbel(3, 7, 100)[[4, 50]], gumbel(3, 7, 100, np.array([4, 50])))
        assert np.array_equal(gumbel(3, 7, 100)[:10], gumbel(3, 7, 10))

    def test_positions_and_seeds_share_nothing(self) -> None:
        draws = np.concatenate([gumbel(seed, position, 64) for seed in (0, 1, -1) for position in range(64)])
        assert len(np.unique(draws)) == len(draws)

    def test_stays_the_same_for_ever(self) -> None:
        """Snapshots outlive releases: other noise would be another text."""
        assert gumbel(1234, 56, 3) == pytest.approx([1.86958327, -0.47460779, 2.59426596], abs=1e-7)

    def test_has_the_gumbel_distribution(self) -> None:
        draws = gumbel(0, 0, 200_000)
        assert np.isfinite(draws).all()
        assert draws.mean() == pytest.approx(0.5772, abs=0.01)
        assert draws.var() == pytest.approx(np.pi**2 / 6, abs=0.03)


class TestSample:
    def test_draws_from_the_softmax(self) -> None:
        scores = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
        params = SamplingParams(temperature=0.7, seed=5)
        drawn = np.bincount([sample(scores, params, position) for position in range(20_000)], minlength=4) / 20_000
        chances = np.exp(scores / 0.7) / np.exp(scores / 0.7).sum()
        assert drawn == pytest.approx(chances, abs=0.012)

    def test_greedy_takes_the_best_penalised(self) -> None:
        scores = np.array([1.0, 3.0, 2.9], np.float32)
        assert sample(scores, SamplingParams(0.0), 0) == 1
        assert sample(scores, SamplingParams(0.0, repetition_penalty=1.5), 0, seen={1}) == 2
        assert sample(scores, SamplingParams(0.0, frequency_penalty=0.06), 0, counts={1: 2}) == 2
        assert sample(scores, SamplingParams(0.0, presence_penalty=0.06), 0, counts={1: 9}) == 1
        assert sample(scores, SamplingParams(0.0, logit_bias={0: 100.0}), 0) == 0

    def test_penalties_are_those_of_the_papers(self) -> None:
        params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1})
        got = penalise(np.array([4.0, -4.0, 1.0, 0.0]), params, {0, 1}, {1: 2, 2: 1})
        assert got.tolist() == [2.0, -9.0, 0.25, 1.0]

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_refuses_scores_that_are_none(self, bad: float) -> None:
        with pytest.raises(ArithmeticError):
            sample(np.array([0.0, bad], np.float32), SamplingParams(), 0)

    @given(
        st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30),
        st.integers(0, 32),
        st.floats(0.01, 1),
        st.floats(0, 1),
    )
    def test_filters_leave_what_their_definitions_say(
        self, scores: list[float], top_k: int, top_p: float, min_p: float
    ) -> None:
        scaled = np.array(scores)
        kept = survivors(scaled, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p))
        left = list(range(len(scores))) if kept is None else kept.tolist()
        weights = np.exp(scaled - scaled.max())
        assert weights[left].max() == 1
        want = list(range(len(scores)))
        if 0 < top_k < len(scores):
            want = [i for i in want if scores[i] >= sorted(scores)[-top_k]]
        if top_p < 1:
            ranked, mass, nucleus = sorted(want, key=lambda i: -scores[i]), 0.0, []
            for token in ranked:
                if mass >= top_p * weights[want].sum() * (1 + 1e-12):
                    break
                nucleus.append(token)
                mass += weights[token]
            want = nucleus
        want = [i for i in want if np.exp(scores[i] - scaled[want].max()) >= min_p]
        # Ids of equal weight may stand in for each other, and rounding decides for one on the very border of top-p or
        # min-p.
        wanted, found = (Counter(np.round(weights[ids], 6).tolist()) for ids in (want, left))
        assert (wanted - found).total() + (found - wanted).total() <= 1


def pieces_of(decode: object, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokeniser = Detokeniser(decode, context)  # type: ignore[arg-type]
    return [*(detokeniser.push(token) for token in ids), detokeniser.flush()]


@st.composite
def chunked(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    whole, chunks = draw(data), []
    while whole:
        size = draw(st.integers(1, 5))
        chunks.append(whole[:size])
        whole = whole[size:]
    return chunks


texts = st.text(st.characters(codec="utf-8"), max_size=60).map(str.encode)


class TestDetokeniser:
    @given(chunked(texts))
    def test_valid_text_comes_whole_and_whole_only(self, chunks: list[bytes]) -> None:
        """Tokens of several bytes that break characters anywhere, as byte-level BPE does."""
        pieces = pieces_of(
            lambda ids: b"".join(chunks[i] for i in ids).decode(errors="replace"), list(range(len(chunks)))
        )
        text = b"".join(chunks).decode()
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)

    @given(chunked(st.binary(max_size=80)))
    def test_garbage_is_what_one_decode_shows(self, chunks: list[bytes]) -> None:
        def decode(ids: Sequence[int]) -> str:
            return b"".join(chunks[i] for i in ids).decode(errors="replace")

        everything = list(range(len(chunks)))
        assert "".join(pieces_of(decode, everything)) == decode(everything)

    @given(texts, st.integers(0, 20))
    def test_byte_fallback(self, data: bytes, cut: int) -> None:
        """A decoder that shows a run of byte tokens as U+FFFD throughout until all of it is valid."""

        def decode(ids: Sequence[int]) -> str:
            raw = bytes(ids)
            try:
                return raw.decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(raw)

        if "\ufffd" not in data.decode():
            try:
                data[:cut].decode()
            except UnicodeDecodeError:
                cut = 0
            assert "".join(pieces_of(decode, data[cut:], data[:cut])) == data[cut:].decode()

    def test_a_space_before_the_first_word_survives(self) -> None:
        """A decoder of the SentencePiece kind drops a leading space; the prompt's last ids keep it."""
        words = ["▁warm", "▁start", "s"]
        decode = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
        assert pieces_of(decode, [1, 2, 0], context=[0]) == [" start", "s", " warm", ""]
        assert pieces_of(decode, [1, 2, 0]) == ["start", "s", " warm", ""]

    def test_characters_come_as_soon_as_they_are_whole(self) -> None:
        assert pieces_of(CODEC.decode, "é€a".encode()) == ["", "é", "", "", "€", "a", ""]

    @pytest.mark.parametrize("byte", [b"a", b"\xff", b"\x80", "€".encode()])
    def test_work_per_token_is_bounded(self, byte: bytes) -> None:
        decoded = 0

        def decode(ids: Sequence[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return bytes(ids).decode(errors="replace")

        ids = list(byte * 3000)
        assert "".join(pieces_of(decode, ids)) == (byte * 3000).decode(errors="replace")
        assert decoded < 60 * len(ids)

    def test_ids_without_text(self) -> None:
        assert "".join(pieces_of(CODEC.decode, [EOS] * 200 + [97] + [EOS] * 3)) == "a"


def oracle(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


class TestStopMatcher:
    @settings(max_examples=400)
    @given(
        st.lists(st.text("abc", max_size=5), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)
    )
    def test_agrees_with_looking_at_every_character(self, pieces: list[str], stops: list[str]) -> None:
        matcher, said, stopped = StopMatcher(stops), "", False
        for piece in pieces:
            text, stopped = matcher.feed(piece)
            said += text
            if stopped:
                break
        if not stopped:
            said += matcher.flush()
        assert (said, stopped) == oracle("".join(pieces), stops)

    def test_holds_back_only_what_may_become_a_stop(self) -> None:
        matcher = StopMatcher(["\n\nUser:"])
        assert matcher.feed("Hello\n") == ("Hello", False)
        assert matcher.feed("\nUs") == ("", False)
        assert matcher.feed("ual") == ("\n\nUsual", False)
        assert matcher.feed("\n\nUser: x") == ("", True)


def request(text: bytes, **more: object) -> GenerationRequest:
    return replace(GenerationRequest("r", (65,), len(text), stop_ids=CODEC.eos_ids), **more)  # type: ignore[arg-type]


class TestGeneration:
    def test_length(self) -> None:
        generation = Generation(request(b"abc"), CODEC)
        events = [generation.advance(token) for token in b"abc"]
        assert [(event.index, event.token, event.text, event.finish) for event in events] == [
            (0, 97, "a", None),
            (1, 98, "b", None),
            (2, 99, "c", "length"),
        ]

    def test_stop_id_says_what_was_held_back(self) -> None:
        generation = Generation(request(b"ab..", stop=("abc",)), CODEC)
        assert [generation.advance(token).text for token in (97, 98, EOS)] == ["", "", "ab"]
        assert generation.finished == "stop"

    def test_stop_string_wins_over_the_length(self) -> None:
        generation = Generation(request(b"xab", stop=("ab",)), CODEC)
        events = [generation.advance(token) for token in b"xab"]
        assert ("".join(event.text for event in events), events[-1].finish) == ("x", "stop")

    def test_an_unfinished_character_at_the_end_is_shown(self) -> None:
        generation = Generation(request(b"a\xe2"), CODEC)
        assert [generation.advance(token).text for token in b"a\xe2"] == ["a", "\ufffd"]

    @given(texts.filter(len), st.data(), st.sampled_from([(), ("b", "ab", "ÿ"), ("\x00\x00",)]))
    def test_restored_anywhere_it_says_the_same(self, data: bytes, draw: st.DataObject, stop: tuple[str, ...]) -> None:
        whole, pieces = Generation(request(data, stop=stop), CODEC), []
        for token in data:
            pieces.append(whole.advance(token))
            if whole.finished:
                break
        cut = draw.draw(st.integers(0, len(pieces) - 1))
        first = Generation(request(data, stop=stop), CODEC)
        said = "".join([first.advance(token).text for token in data[:cut]])
        second = Generation.restore(first.state("toy", "r"), CODEC)
        assert second.emitted == len(said)
        assert [second.advance(event.token) for event in pieces[cut:]] == pieces[cut:]  # type: ignore[arg-type]

    def test_restored_with_text_unsaid_it_says_it(self) -> None:
        generation = Generation(request(b"abcdef"), CODEC)
        for token in b"abcd":
            generation.advance(token)
        late = replace(generation.state("toy", "r"), emitted=2)
        assert Generation.restore(late, CODEC).advance(101).text == "cde"
        assert Generation.restore(late, CODEC).state("toy", "r") == late

    @pytest.mark.parametrize(
        "change", [{"version": 99}, {"emitted": 5}, {"emitted": -1}, {"generated": tuple(b"abcdef")}]
    )
    def test_nonsense_is_not_restored(self, change: dict[str, object]) -> None:
        generation = Generation(request(b"abcdef"), CODEC)
        generation.advance(97)
        with pytest.raises(ValueError, match=r"version|characters|complete"):
            Generation.restore(replace(generation.state("toy", "r"), **change), CODEC)  # type: ignore[arg-type]

    def test_penalties_see_prompt_and_answer(self) -> None:
        params = SamplingParams(0.0, repetition_penalty=2.0)
        generation = Generation(request(b"abc", prompt=(1, 2), sampling=params), CODEC)
        scores = np.array([0.5, 1.5, 1.6, 1.1, 1.0], np.float32)
        assert generation.sample(scores) == 3
        generation.advance(3)
        assert generation.sample(scores) == 4
