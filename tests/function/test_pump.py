"""A handler's stream on a thread of its own: its pieces, its end, and what its code may expect."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from runtime import sse
from runtime.errors import AnswerTooLong
from runtime.function.handler import to_response
from runtime.function.pump import END, NOTHING, Pump

SECONDS = 120.0
EVENTS = "text/event-stream"


def test_pieces_in_order_then_the_end() -> None:
    pump = Pump(["a", b"b"], nullcontext)
    assert [pump.next(SECONDS) for _ in range(3)] == ["a", b"b", END]


def test_a_piece_is_made_when_it_is_asked_for(eventually: Callable[..., Any]) -> None:
    made: list[int] = []

    def pieces() -> Iterator[str]:
        for number in range(9):
            made.append(number)
            yield str(number)

    pump = Pump(pieces(), nullcontext)
    assert made == []
    assert (pump.next(SECONDS), made) == ("0", [0])
    assert (pump.next(SECONDS), made) == ("1", [0, 1])
    pump.leave()
    over = threading.Event()
    pump.on_end(over.set)
    assert over.wait(SECONDS)
    assert made == [0, 1]


def test_nothing_within_the_time_and_the_piece_later() -> None:
    gate = threading.Event()

    def pieces() -> Iterator[str]:
        gate.wait(SECONDS)
        yield "late"

    pump = Pump(pieces(), nullcontext)
    assert pump.next(0.01) is NOTHING
    assert pump.next(-1.0) is NOTHING
    gate.set()
    assert pump.next(SECONDS) == "late"
    assert pump.next(SECONDS) is END


@pytest.mark.parametrize("error", [KeyError("gone"), SystemExit(3), KeyboardInterrupt()])
def test_what_it_raises_comes_to_whoever_asks(error: BaseException) -> None:
    def pieces() -> Iterator[str]:
        yield "a"
        raise error

    pump = Pump(pieces(), nullcontext)
    assert pump.next(SECONDS) == "a"
    with pytest.raises(type(error)):
        pump.next(SECONDS)


def test_all_of_it_runs_on_one_thread_and_inside_the_scope() -> None:
    """An iterator may enter what belongs to a thread, like torch's modes, at one piece and leave it at another."""
    threads: list[int] = []
    inside: list[bool] = []
    entered = threading.local()

    @contextmanager
    def scope() -> Iterator[None]:
        entered.now = True
        yield
        entered.now = False

    class Pieces:
        def __iter__(self) -> Iterator[str]:
            for piece in "ab":
                threads.append(threading.get_ident())
                inside.append(entered.now)
                yield piece

        def close(self) -> None:
            threads.append(threading.get_ident())

    pump = Pump(Pieces(), scope)
    over = threading.Event()
    pump.on_end(over.set)
    assert [pump.next(SECONDS) for _ in range(3)] == ["a", "b", END]
    assert over.wait(SECONDS)
    assert (len(threads), len(set(threads)), inside) == (3, 1, [True, True])
    assert threads[0] != threading.get_ident()


def test_its_end_is_told_late_and_early_comers() -> None:
    gate = threading.Event()

    def pieces() -> Iterator[str]:
        gate.wait(SECONDS)
        yield "a"

    pump, told = Pump(pieces(), nullcontext), threading.Event()
    assert pump.next(0.0) is NOTHING
    pump.leave()
    pump.on_end(told.set)
    assert not told.is_set(), "its code still runs"
    gate.set()
    assert told.wait(SECONDS)
    calls: list[int] = []
    pump.on_end(lambda: calls.append(1))
    assert calls == [1]


# --- as a response ----------------------------------------------------------------------------------------------------


def stream(pieces: object, accept: str, ends: float) -> Iterator[bytes]:
    return iter(to_response(pieces, accept, nullcontext, ends).response)  # type: ignore[arg-type]


def endless() -> Iterator[str]:
    while True:
        yield "x"


def silent(gate: threading.Event) -> Iterator[str]:
    yield "first"
    gate.wait(SECONDS)
    yield "last"


def test_a_stream_that_takes_too_long_ends_with_an_error_and_the_terminator() -> None:
    *pieces, error, done = stream(endless(), EVENTS, time.monotonic() + 0.05)
    assert set(pieces) == {b"data: x\n\n"}
    (event,) = sse.EventParser().feed(error)
    assert (event.event, '"code": "answer_limit"' in event.data, done) == ("error", True, sse.DONE)


def test_also_one_whose_handler_is_stuck() -> None:
    """Nobody can end its code; its client need not wait for it."""
    gate = threading.Event()
    try:
        first, error, done = stream(silent(gate), EVENTS, time.monotonic() + 0.2)
        assert (first, b"answer_limit" in error, done) == (b"data: first\n\n", True, sse.DONE)
    finally:
        gate.set()


def test_comments_while_a_handler_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.function.handler._KEEP_ALIVE", 0.01)
    monkeypatch.setattr("runtime.function.handler._COMMIT_AFTER", 0.01)
    gate = threading.Event()

    def pieces() -> Iterator[str]:
        gate.wait(SECONDS)
        yield "a"

    body = stream(pieces(), EVENTS, time.monotonic() + SECONDS)
    assert [next(body), next(body)] == [sse.KEEP_ALIVE] * 2, "the response has begun, and goes on"
    gate.set()
    assert [piece for piece in body if piece != sse.KEEP_ALIVE] == [b"data: a\n\n", sse.DONE]


def test_a_text_that_takes_too_long_is_cut() -> None:
    body = stream(endless(), "", time.monotonic() + 0.05)
    with pytest.raises(AnswerTooLong):
        list(body)
