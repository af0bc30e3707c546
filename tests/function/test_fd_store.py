"""What a worker gives the shim for the next one: memory changes hands, nothing leaks, and nobody is fooled."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from runtime.process.control import ShimEnd, WorkerEnd
from runtime.process.fd_store import MOST_FDS, FdStore


def memory(content: bytes) -> int:
    fd = os.memfd_create("weights")
    os.write(fd, content)
    return fd


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def kept() -> Iterator[FdStore]:
    before = open_fds()
    made = FdStore()
    yield made
    made.close()
    assert open_fds() == before


class Worker:
    """One worker's line: its own end, and the shim's."""

    def __init__(self, kept: FdStore) -> None:
        ours, theirs = socket.socketpair()
        self.hearing = ShimEnd(ours, kept)
        self.sock = theirs
        self.line = WorkerEnd(theirs)

    def heard(self, kept: FdStore) -> list[dict[str, object]]:
        """What the shim hears, and does about memory."""
        messages = self.hearing.messages()
        for message in messages:
            if "keep" in message:
                kept.take(int(str(message["keep"])))
        return messages

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.hearing.close()
        self.sock.close()


def test_what_one_worker_gives_the_next_one_gets(kept: FdStore) -> None:
    given = [memory(b"manifest"), memory(b"segment 0"), memory(b"segment 1")]
    with Worker(kept) as first:
        assert first.line.kept() == []
        first.line.send(beat=1)
        first.line.keep(given)
        first.line.send(state="ready")
        assert first.heard(kept) == [{"beat": 1}, {"keep": 3}, {"state": "ready"}]
    wanted = inodes(given)
    for fd in given:
        os.close(fd)
    for _ in range(3):  # and it crashes, and the next one is given them, too
        with Worker(kept) as worker:
            got = worker.line.kept()
            assert inodes(got) == wanted
            assert not any(os.get_inheritable(fd) for fd in got)
            assert os.pread(got[1], 20, 0) == b"segment 0"
            for fd in got:
                os.close(fd)
            worker.hearing.tell(retire=1)
            assert next(worker.line.messages()) == {"retire": 1}


def test_new_memory_takes_the_place_of_the_old(kept: FdStore) -> None:
    before = open_fds()
    for size in (3, 2, 5):
        given = [memory(b"x") for _ in range(size)]
        with Worker(kept) as worker:
            worker.line.keep(given)
            worker.heard(kept)
            copies = kept.copies()
            assert inodes(copies) == inodes(given)
        for fd in (*given, *copies):
            os.close(fd)
        assert open_fds() == before + size
    with Worker(kept) as worker:
        worker.line.keep([])
        worker.heard(kept)
        assert open_fds() == before + 2, "a worker that has no use for it says so; its line is open"
    with Worker(kept) as worker:
        assert worker.line.kept() == []


@pytest.mark.parametrize("said", [b"keep=5\0\n", b"keep=0\0\n", b"keep=-1\0\n", b"beat=1\0\n", b"\0\n"])
def test_fds_that_no_message_counts_are_closed_by_the_next_worker(kept: FdStore, said: bytes) -> None:
    """User code may have got hold of the line."""
    before = open_fds()
    with Worker(kept) as worker:
        socket.send_fds(worker.sock, [said], [worker.sock.fileno()] * 2)
        worker.heard(kept)
    with Worker(kept) as worker:
        assert worker.line.kept() == []
    assert open_fds() == before


def test_a_flood_of_fds_is_closed(kept: FdStore) -> None:
    before = open_fds()
    with Worker(kept) as worker:
        for _ in range(4):
            socket.send_fds(worker.sock, [b"beat=1\0\n"], [worker.sock.fileno()] * 200)
            worker.heard(kept)
            assert open_fds() <= before + 2 + MOST_FDS
        worker.line.keep([worker.sock.fileno()] * (MOST_FDS + 1))
        assert worker.heard(kept) == [], "more than the kernel passes at once is not given at all"


def test_a_worker_without_a_shim_of_ours_has_nothing_to_wait_for() -> None:
    assert WorkerEnd(None).kept() == []
    WorkerEnd(None).keep([0])
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        line = WorkerEnd(theirs)
        assert line.kept() == []
        line.keep([0])
