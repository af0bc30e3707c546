"""Weights that a worker gives the shim for the next one: memory changes hands, nothing leaks, garbage is closed."""

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
def fd_store() -> Iterator[FdStore]:
    before = open_fds()
    made = FdStore()
    yield made
    made.close()
    assert open_fds() == before


class Worker:
    """One worker's line: the worker's end, and the shim's."""

    def __init__(self, fd_store: FdStore) -> None:
        ours, theirs = socket.socketpair()
        self.hearing = ShimEnd(ours, fd_store)
        self.sock = theirs
        self.line = WorkerEnd(theirs)

    def heard(self, fd_store: FdStore) -> list[dict[str, object]]:
        """Return what the shim hears, and take the fds as it does."""
        messages = self.hearing.messages()
        for message in messages:
            if "keep" in message:
                fd_store.take(int(str(message["keep"])))
        return messages

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.hearing.close()
        self.sock.close()


def test_what_one_worker_gives_the_next_one_gets(fd_store: FdStore) -> None:
    given = [memory(b"manifest"), memory(b"segment 0"), memory(b"segment 1")]
    with Worker(fd_store) as first:
        assert first.line.stored() == []
        first.line.send(beat=1)
        first.line.store(given)
        first.line.send(state="ready")
        assert first.heard(fd_store) == [{"beat": 1}, {"keep": 3}, {"state": "ready"}]
    wanted = inodes(given)
    for fd in given:
        os.close(fd)
    for _ in range(3):  # and it crashes, and the next one is given them, too
        with Worker(fd_store) as worker:
            got = worker.line.stored()
            assert inodes(got) == wanted
            assert not any(os.get_inheritable(fd) for fd in got)
            assert os.pread(got[1], 20, 0) == b"segment 0"
            for fd in got:
                os.close(fd)
            worker.hearing.tell(retire=1)
            assert next(worker.line.messages()) == {"retire": 1}


def test_new_memory_takes_the_place_of_the_old(fd_store: FdStore) -> None:
    before = open_fds()
    for size in (3, 2, 5):
        given = [memory(b"x") for _ in range(size)]
        with Worker(fd_store) as worker:
            worker.line.store(given)
            worker.heard(fd_store)
            copies = fd_store.copies()
            assert inodes(copies) == inodes(given)
        for fd in (*given, *copies):
            os.close(fd)
        assert open_fds() == before + size
    with Worker(fd_store) as worker:
        worker.line.store([])
        worker.heard(fd_store)
        assert open_fds() == before + 2, "a worker that has no use for it says so; its line is open"
    with Worker(fd_store) as worker:
        assert worker.line.stored() == []


@pytest.mark.parametrize("said", [b"keep=5\0\n", b"keep=0\0\n", b"keep=-1\0\n", b"beat=1\0\n", b"\0\n"])
def test_fds_that_no_message_counts_are_closed_by_the_next_worker(fd_store: FdStore, said: bytes) -> None:
    """User code may have got hold of the line."""
    before = open_fds()
    with Worker(fd_store) as worker:
        socket.send_fds(worker.sock, [said], [worker.sock.fileno()] * 2)
        worker.heard(fd_store)
    with Worker(fd_store) as worker:
        assert worker.line.stored() == []
    assert open_fds() == before


def test_a_flood_of_fds_is_closed(fd_store: FdStore) -> None:
    before = open_fds()
    with Worker(fd_store) as worker:
        for _ in range(4):
            socket.send_fds(worker.sock, [b"beat=1\0\n"], [worker.sock.fileno()] * 200)
            worker.heard(fd_store)
            assert open_fds() <= before + 2 + MOST_FDS
        worker.line.store([worker.sock.fileno()] * (MOST_FDS + 1))
        assert worker.heard(fd_store) == [], "more than the kernel passes at once is not given at all"


def test_a_worker_without_a_shim_of_ours_has_nothing_to_wait_for() -> None:
    assert WorkerEnd(None).stored() == []
    WorkerEnd(None).store([0])
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        line = WorkerEnd(theirs)
        assert line.stored() == []
        line.store([0])
