"""The line between worker and shim: what one end writes the other reads, and garbage hurts neither."""

from __future__ import annotations

import socket
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.process.control import MAX_LINE, Lines, WorkerEnd, line
from runtime.process.messages import pack

texts = st.text(st.characters(exclude_characters="\0\v", exclude_categories=["Cs"]))
names = st.sampled_from(["state", "text", "error", "agent"])
messages = st.dictionaries(names, texts, min_size=1).flatmap(
    lambda message: st.just(message) | st.integers(0, 1 << 50).map(lambda number: {**message, "beat": number})
)


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 2000)))
def test_messages_arrive_however_they_are_cut(sent: list[dict[str, Any]], cuts: list[int]) -> None:
    raw = b"".join(line(message) for message in sent)
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    lines, received = Lines(), []
    for at, end in pairwise(places):
        received += lines.feed(raw[at:end])
    assert received == sent


@given(st.binary())
def test_garbage_is_skipped_and_the_next_message_is_heard(garbage: bytes) -> None:
    lines = Lines()
    for message in lines.feed(garbage + b"\n"):
        assert isinstance(message, dict)
    assert lines.feed(b"beat=1\0\n") == [{"beat": 1}]


def test_a_line_that_is_no_message_is_skipped() -> None:
    assert Lines().feed(b"1\nbeat=2\nbeat=x\0\nspan=1\0\n\0\n\nbeat=1\0\n") == [{"beat": 1}]


def test_a_line_without_an_end_takes_no_memory() -> None:
    lines = Lines()
    for _ in range(100):
        lines.feed(b"x" * MAX_LINE)
    assert len(lines._buffer) <= MAX_LINE
    assert lines.feed(b"\nbeat=1\0\n") == [{"beat": 1}]


def test_many_spans_stay_below_the_longest_line() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rows = [("worker", "x" * 50, n, n + 1) for n in range(1000)]
        sender = threading.Thread(target=WorkerEnd(ours).spans, args=(rows,))
        sender.start()
        lines, received = Lines(), []
        while len(received) < len(rows):
            data = theirs.recv(4096)
            assert data, "the line was closed"
            for message in lines.feed(data):
                assert len(pack(message)) < MAX_LINE
                received += message["spans"]
        sender.join()
        assert received == rows


def test_threads_do_not_mix_their_messages() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = WorkerEnd(ours)
        threads = [
            threading.Thread(target=lambda n=n: [end.send(beat=n, text="y" * 100) for _ in range(50)]) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        lines, received = Lines(), []
        while len(received) < 400:
            received += lines.feed(theirs.recv(4096))
        for thread in threads:
            thread.join()
        assert sorted(message["beat"] for message in received) == sorted(list(range(8)) * 50)
        assert all(message["text"] == "y" * 100 for message in received)


def test_a_shim_that_is_gone_is_no_reason_to_fail() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    end = WorkerEnd(ours)
    end.send(beat=1)
    end.send(beat=2)
    assert ours.fileno() == -1, "given up after the first failure"


@pytest.mark.timeout(30)
def test_a_shim_that_does_not_read_cannot_block_the_worker() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = WorkerEnd(ours)
        while ours.fileno() >= 0:  # ends when the buffer is full and the line gives up
            end.send(text="z" * 60_000)


def test_without_a_shim_nothing_is_sent() -> None:
    WorkerEnd(None).send(beat=1)
