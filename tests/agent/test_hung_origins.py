"""Origins that accept and never answer: they delay the callers of their models, and no others."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import threading
from pathlib import Path

import pytest
from leased import contents, large_tensors, ready, tensors_of

from cache_agent.errors import OriginUnavailable
from cache_agent.model.uri import parse_uri
from cache_agent.residency.background import HERE, Background, Lane, here, lane_of
from cache_agent.tiers.s3 import S3, S3Origin
from cache_agent.wire.messages import LeaseRequest

ROOTS = [Path("/"), Path("/models"), Path("/models/shared")]


# --- lanes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "lane"),
    [
        ("s3://bucket/llama", Lane("s3", "bucket")),
        ("s3://other/llama", Lane("s3", "other")),
        ("hf://org/name@main", Lane("hf", "org")),
        ("file:///models/llama", Lane("file /models", "llama")),
        ("file:///models/shared/a/b", Lane("file /models/shared", "a")),
        ("file:///models/shared/../x", Lane("file /models", "x")),
        ("file:///elsewhere/m", Lane("file /", "elsewhere")),
        ("file:///", Lane("file /")),
        ("gopher://a/m", Lane("unknown", "gopher")),
    ],
)
def test_a_lane_is_what_fails_together(uri, lane):
    assert lane_of(parse_uri(uri), ROOTS) == lane


def test_whatever_is_asked_for_there_are_only_so_many_origins():
    schemes = [f"x{number}" for number in range(1000)]
    uris = [*(f"{scheme}://a/m" for scheme in schemes), *(f"s3://b{n}/m" for n in range(1000))]
    assert len({lane_of(parse_uri(uri), ROOTS).origin for uri in uris}) == 2
    assert lane_of(parse_uri("file:///m"), []) == Lane("file")
    assert here(Lane("s3", "a")).origin == HERE.origin


@pytest.fixture
def jobs():
    made = Background("test", of_origin=4, of_place=2)
    yield made
    made.close()


class Blocked:
    """Jobs that hang until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = threading.Semaphore(0)
        self.ended: list[str] = []

    def __call__(self, name: str) -> None:
        self.running.release()
        assert self.go.wait(30)
        self.ended.append(name)


def test_a_hanging_place_leaves_the_origins_other_places_their_threads(jobs):
    hung, other, done = Blocked(), Blocked(), threading.Event()
    for number in range(10):
        jobs.submit(Lane("s3", "hung"), hung, f"{number}")
    assert all(hung.running.acquire(timeout=10) for _ in range(2))
    for number in range(2):
        jobs.submit(Lane("s3", "other"), other, f"{number}")
    assert all(other.running.acquire(timeout=10) for _ in range(2))
    assert not hung.running.acquire(blocking=False), "two at once, and no more"
    # All of the origin's threads hang now; those of others do not.
    jobs.submit(Lane("file /"), done.set)
    assert done.wait(10)
    other.go.set()
    hung.go.set()
    assert all(hung.running.acquire(timeout=10) for _ in range(8)), "whoever waited has his turn"


def test_jobs_run_in_the_order_of_their_coming_and_one_that_fails_harms_none(jobs, eventually):
    blocked, ran = Blocked(), []

    def fail() -> None:
        raise RuntimeError("as the test wants it")

    for _ in range(2):
        jobs.submit(Lane("s3", "a"), blocked, "")
    assert all(blocked.running.acquire(timeout=10) for _ in range(2))
    for number in range(20):
        jobs.submit(Lane("s3", "a"), fail if number % 5 == 0 else lambda number=number: ran.append(number))
    assert not ran
    blocked.go.set()
    eventually(lambda: len(ran) == 16)
    assert sorted(ran) == [number for number in range(20) if number % 5]
    eventually(lambda: not jobs._running, what="nothing is kept of a place where nothing happens")
    assert not jobs._waiting


def test_after_its_end_nothing_is_begun(jobs):
    blocked, ran = Blocked(), []
    for _ in range(5):
        jobs.submit(Lane("s3", "a"), blocked, "ran")
    assert all(blocked.running.acquire(timeout=10) for _ in range(2))
    jobs.close()
    with pytest.raises(RuntimeError):
        jobs.submit(Lane("s3", "b"), ran.append, 1)
    blocked.go.set()
    for pool in jobs._pools.values():
        pool.shutdown(wait=True)
    assert blocked.ended == ["ran", "ran"]


def test_a_job_for_which_no_thread_can_be_started_waits_for_one(jobs, monkeypatch, eventually):
    ran = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    jobs.submit(Lane("s3", "a"), ran.append, 1)
    monkeypatch.setattr(threading.Thread, "start", start)
    jobs.submit(Lane("s3", "a"), ran.append, 2)
    eventually(lambda: ran == [1, 2])


# --- agents -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def never_answering():
    """An endpoint that accepts every connection and says nothing: (its URL, its connections)."""
    taken: list[socket.socket] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:

        def accept() -> None:
            while not over.is_set():
                if select.select([server], [], [], 0.05)[0]:
                    taken.append(server.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        finally:
            over.set()
            thread.join()
            for sock in taken:
                sock.close()


def test_models_of_a_hung_store_do_not_keep_others_from_loading(
    start_agent, s3, tmp_path, write_checkpoint, random_tensors, eventually
):
    uri = f"file://{write_checkpoint(tmp_path / 'm', seed=3)}"
    with never_answering() as (endpoint, taken), contextlib.ExitStack() as stack:
        agent = start_agent("--s3-endpoint", endpoint, env=s3.env)
        waiting = [stack.enter_context(agent.client.connect()) for _ in range(40)]
        for number, channel in enumerate(waiting):  # in as many buckets, which have bounds of their own
            channel.send(LeaseRequest(f"s3://bucket-{number}/m"))
        eventually(lambda: len(taken) >= 16, 20, "the store has all that it will get, and answers nothing")
        with ready(agent, uri, 10) as lease:
            assert tensors_of(lease) == contents(random_tensors(3))
        assert not select.select(waiting, [], [], 0)[0], "they all wait still"


@pytest.fixture
def stored(s3, checkpoint_files, monkeypatch):
    """Return (URI, tensors) of a model of four ranges and more, in a store that can be stopped."""
    if not s3.pid:
        pytest.skip("GLOWPLUG_TEST_S3_URL names a server that is not ours to stop")
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    tensors = large_tensors(4)
    yield s3.upload(s3.new_bucket(), "m", checkpoint_files(tensors)), tensors
    os.kill(s3.pid, signal.SIGCONT)


def test_a_store_that_is_stopped_in_the_middle_of_a_load_and_goes_on(stored, s3, start_local_agent, caplog):
    """Bytes that came are not asked for again, and ranges that hung come over other connections."""
    uri, tensors = stored
    store = S3(endpoint=s3.endpoint, patience=0.6)
    lock = threading.Lock()
    ranges, failures, arrived = [], [], []

    class Stopped(S3Origin):
        """Its server sleeps from the third range on, until a read was given up."""

        def read_scattered(self, file, start, views, tell):
            if not start:  # what describes the model
                return super().read_scattered(file, start, views, tell)
            with lock:
                ranges.append(start)
                if len(ranges) == 3:
                    os.kill(s3.pid, signal.SIGSTOP)

            def count(size: int) -> None:
                arrived.append(size)
                tell(size)

            try:
                return super().read_scattered(file, start, views, count)
            except OriginUnavailable as error:
                failures.append(str(error))
                os.kill(s3.pid, signal.SIGCONT)
                raise

    caplog.set_level(logging.ERROR, "glowplug.loader")  # a warning's record keeps the error, and that its connection
    agent = start_local_agent({uri: Stopped(parse_uri(uri), store)}, readers=2)
    try:
        with ready(agent, uri, 60) as lease:
            assert tensors_of(lease) == contents(tensors)
        assert failures, "the store did sleep"
        assert sum(arrived) == sum(len(content) for _, _, content in tensors.values()), "every byte came once"
    finally:
        store.client().close()
        gc.collect()  # an error and its traceback hold each other, and a connection
