"""A worker's states, whom it lets in, and when it may end."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime.errors import EngineBusy, ModelUnusable, NotReady
from runtime.http.lifecycle import Lifecycle

MODEL: Any = object()
SOON = 120.0  # seconds that only a broken lifecycle would take


@pytest.fixture
def lifecycle() -> Lifecycle:
    return Lifecycle("llama", capacity=3)


def test_it_starts_without_a_model(lifecycle: Lifecycle) -> None:
    assert (lifecycle.state, lifecycle.inside, lifecycle.handler, lifecycle.error) == ("starting", 0, None, None)
    assert lifecycle.wait(0.0) is None


def test_opened(lifecycle: Lifecycle) -> None:
    handler: Any = object()
    lifecycle.opened(MODEL, handler)
    assert lifecycle.state == "ready"
    assert lifecycle.wait(0.0) is MODEL
    assert lifecycle.handler is handler


def test_a_failed_start_is_told_to_everyone_who_asks(lifecycle: Lifecycle) -> None:
    lifecycle.fail(ModelUnusable("no such architecture"))
    assert lifecycle.state == "failed"
    for _ in range(2):
        with pytest.raises(ModelUnusable, match="no such architecture"):
            lifecycle.wait(SOON)
    assert isinstance(lifecycle.error, ModelUnusable)


def test_those_who_wait_are_woken_by_the_model(lifecycle: Lifecycle) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(lifecycle.wait, SOON) for _ in range(8)]
        lifecycle.opened(MODEL, None)
        assert [future.result(SOON) for future in waiting] == [MODEL] * 8


def test_those_who_wait_are_woken_by_the_failure(lifecycle: Lifecycle) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(lifecycle.wait, SOON) for _ in range(8)]
        lifecycle.fail(ModelUnusable("no"))
        assert all(isinstance(future.exception(SOON), ModelUnusable) for future in waiting)


def test_while_starting_the_one_too_many_is_told_to_come_back(lifecycle: Lifecycle) -> None:
    for _ in range(3):
        lifecycle.enter()
    with pytest.raises(NotReady, match="3 requests wait for it already") as caught:
        lifecycle.enter()
    assert caught.value.status == 503
    assert caught.value.retry_after > 0
    assert lifecycle.inside == 3


@pytest.mark.parametrize("draining", [False, True])
def test_when_ready_the_one_too_many_finds_it_busy(lifecycle: Lifecycle, draining: bool) -> None:
    lifecycle.opened(MODEL, None)
    if draining:
        lifecycle.drain("asked")
    for _ in range(3):
        lifecycle.enter()
    with pytest.raises(EngineBusy) as caught:
        lifecycle.enter()
    assert caught.value.status == 429
    assert caught.value.retry_after > 0
    lifecycle.leave()
    lifecycle.enter()


def test_it_knows_how_long_requests_lately_took(lifecycle: Lifecycle) -> None:
    assert lifecycle.longest == 0.0
    for took in (1.0, 9.0, 2.0):
        lifecycle.enter()
        lifecycle.leave(took)
    assert lifecycle.longest == 9.0
    for _ in range(64):
        lifecycle.enter()
        lifecycle.leave(0.5)
    assert lifecycle.longest == 0.5


def test_a_drain_begins_once(lifecycle: Lifecycle) -> None:
    lifecycle.opened(MODEL, None)
    assert lifecycle.draining == ""
    assert lifecycle.drain("SIGTERM")
    assert not lifecycle.drain("the agent")
    assert (lifecycle.state, lifecycle.draining) == ("draining", "SIGTERM")


def test_a_drain_without_a_reason_is_a_drain(lifecycle: Lifecycle) -> None:
    assert lifecycle.drain("")
    assert lifecycle.draining


def test_a_drain_while_starting_is_remembered(lifecycle: Lifecycle) -> None:
    assert lifecycle.drain("SIGTERM")
    assert lifecycle.state == "starting", "those who wait are still to be answered"
    lifecycle.enter()
    lifecycle.opened(MODEL, None)
    assert lifecycle.state == "draining"
    assert lifecycle.wait(0.0) is MODEL


def test_a_draining_worker_goes_on_letting_requests_in(lifecycle: Lifecycle) -> None:
    lifecycle.opened(MODEL, None)
    lifecycle.drain("SIGTERM")
    lifecycle.enter()
    assert lifecycle.inside == 1


def test_drained_is_the_end_except_of_a_failure(lifecycle: Lifecycle) -> None:
    lifecycle.opened(MODEL, None)
    lifecycle.drained()
    assert lifecycle.state == "drained"
    broken = Lifecycle("llama", 1)
    broken.fail(ModelUnusable("no"))
    broken.drained()
    assert broken.state == "failed"


def test_many_threads_never_exceed_the_capacity(rounds: Callable[[int, int], int]) -> None:
    capacity, threads, turns = 4, 16, rounds(200, 5000)
    lifecycle = Lifecycle("llama", capacity)
    most, refused, served = 0, 0, 0
    lock, start = threading.Lock(), threading.Barrier(threads)

    def visit(seed: int) -> None:
        nonlocal most, refused, served
        chance = random.Random(seed)
        start.wait(SOON)
        for _ in range(turns):
            try:
                lifecycle.enter()
            except (NotReady, EngineBusy):
                with lock:
                    refused += 1
                continue
            with lock:
                most, served = max(most, lifecycle.inside), served + 1
            if chance.random() < 0.5:
                lifecycle.wait(0.001)
            lifecycle.leave()

    with ThreadPoolExecutor(threads) as pool:
        visits = [pool.submit(visit, seed) for seed in range(threads)]
        lifecycle.opened(MODEL, None)
        lifecycle.drain("half-way")
        for future in visits:
            future.result(SOON)
    assert most <= capacity
    assert served + refused == threads * turns
    assert served > 0
    assert lifecycle.inside == 0
