"""What each step feeds: everybody who decodes gets on, prompts share what is left, deterministic rows keep apart."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.schedule import Forward, Need, plan

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@st.composite
def needs(draw: st.DrawFn) -> Need:
    prompt = draw(st.integers(1, 60))
    known = prompt + draw(st.integers(0, 20))
    exact = draw(st.booleans())
    return Need(prompt, known, draw(st.integers(0, known - 1)), exact, not exact and draw(st.booleans()))


@given(st.lists(needs(), min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 6))
def test_every_step_is_lawful(rows: list[Need], chunk: int, fixed: int) -> None:
    forwards = plan(rows, chunk, fixed)
    fed = [piece for forward in forwards for piece in forward.pieces]
    assert len({row for row, _ in fed}) == len(fed)
    for row, count in fed:
        assert 1 <= count <= max(1, rows[row].piece)
    decoding = {row for row, need in enumerate(rows) if not need.piece}
    assert decoding <= {row for row, _ in fed}
    for forward in forwards:
        counts = [count for _, count in forward.pieces]
        assert counts == sorted(counts, key=lambda count: count > 1)
        exact = [row for row, _ in forward.pieces if rows[row].exact]
        if forward.fixed:
            assert exact
            assert len(forward.pieces) + forward.padding == fixed
            assert set(counts) == {1}
        else:
            assert forward.padding == 0
            assert len(exact) == 0 or len(forward.pieces) == 1
        if not exact:
            assert sum(forward_count for forward_count in counts) <= max(chunk, len(decoding) + 1)
    for row, count in fed:
        if rows[row].exact and rows[row].piece:
            assert count == rows[row].piece or (rows[row].fed + count) % chunk == 0


@given(st.lists(needs(), min_size=1, max_size=12), st.integers(2, 30), st.integers(1, 6))
def test_the_oldest_prompt_always_gets_on(rows: list[Need], chunk: int, fixed: int) -> None:
    fed = {row for forward in plan(rows, chunk, fixed) for row, _ in forward.pieces}
    for exact in (True, False):
        prompts = [row for row, need in enumerate(rows) if need.piece and need.exact == exact]
        assert not prompts or prompts[0] in fed


def test_a_long_prompt_leaves_half_to_short_ones() -> None:
    rows = [Need(1000, 1000, 0), Need(20, 20, 0), Need(6, 6, 0), Need(5, 9, 8)]
    assert plan(rows, 32, 4) == [Forward(((3, 1), (0, 16), (2, 6), (1, 9)))]


def test_equal_prompts_come_one_after_the_other() -> None:
    assert plan([Need(30, 30, 0)] * 3, 40, 4) == [Forward(((0, 30), (1, 10)))]


def test_free_places_of_a_fixed_batch_are_lent() -> None:
    rows = [Need(4, 9, 8, exact=True), Need(4, 9, 8), Need(4, 9, 8)]
    assert plan(rows, 32, 2) == [Forward(((0, 1), (1, 1)), 0, True), Forward(((2, 1),))]
    assert plan(rows[:1], 32, 4) == [Forward(((0, 1),), 3, True)]


def test_an_answer_fed_again() -> None:
    assert plan([Need(4, 30, 4, batchable=True)], 16, 4) == [Forward(((0, 16),))]
    assert plan([Need(4, 30, 4)], 16, 4) == [Forward(((0, 1),))]


def test_deterministic_prompts_fill_a_step_one_by_one() -> None:
    rows = [Need(100, 100, 0, exact=True), *[Need(10, 10, 0, exact=True)] * 3, Need(30, 30, 0, exact=True)]
    assert plan(rows, 32, 4) == [Forward(((0, 32),)), Forward(((1, 10),))]
    assert plan(rows[1:], 32, 4) == [Forward(((i, 10),)) for i in range(3)]
