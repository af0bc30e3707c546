"""Processes of a function are killed at every kind of moment: it serves on, or ends with the truth; nothing leaks."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

COMPLETION = {"prompt": "a", "max_tokens": 2, "temperature": 0}
ENDLESS = {"prompt": "a", "max_tokens": 10_000, "temperature": 0, "stream": True, "logit_bias": {"0": -100}}


def _answers(function: Any) -> bool:
    """A fresh request is answered; whoever asks at the moment of the kill may be cut off and asks again."""
    try:
        return bool(function.request("/v1/completions", COMPLETION).status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _assert_answers(function: Any) -> None:
    function.until(lambda: _answers(function), "a request is answered")


@pytest.fixture(scope="module")
def function(serving: Callable[..., Any], checkpoint: Path) -> Iterator[Any]:
    """One function with a private agent that survives all that this module does to it, in order."""
    with serving(model=checkpoint, worker_timeout=10) as function:
        yield function.wait_ready()


def test_the_private_agent_is_killed_while_the_function_serves(function: Any) -> None:
    agent, worker = function.agent(), function.worker()
    with closing(function.connect()) as connection:
        connection.request("POST", "/v1/completions", json.dumps(ENDLESS), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        os.kill(agent, signal.SIGKILL)
        function.says("the private cache agent ended (-9); starting another")
        assert response.readline() == b"\n"
        assert response.readline().startswith(b"data: "), "the stream does not notice"
    _assert_answers(function)
    assert function.worker() == worker
    assert function.agent(old=agent)


def test_the_worker_is_killed_while_it_serves(function: Any) -> None:
    """Also the first lease with the private agent that came after the first one."""
    worker = function.worker()
    with closing(function.connect()) as connection:
        connection.request("POST", "/v1/completions", json.dumps(ENDLESS), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        os.kill(worker, signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    # The port is the shim's: this request waits for the next worker.
    assert function.request("/v1/completions", COMPLETION).status == 200
    assert function.worker(old=worker)
    assert "the worker was killed by SIGKILL (if nobody sent it, the container's memory limit is too small)" in (
        function.output()
    )


def test_a_worker_that_hangs_is_killed_and_replaced(function: Any) -> None:
    function.wait_ready()
    worker = function.worker()
    os.kill(worker, signal.SIGSTOP)
    assert function.request("/v1/completions", COMPLETION).status == 200
    assert function.worker(old=worker)
    assert "the worker was silent for 10 s and is killed" in function.output()
    assert function.process.poll() is None


def test_a_worker_that_dies_again_and_again_ends_the_function(started: Callable[..., Any], checkpoint: Path) -> None:
    """It is killed as soon as it is there: it need not get far to be counted."""
    function, worker = started(model=checkpoint), 0
    for _ in range(4):
        worker = function.worker(old=worker)
        os.kill(worker, signal.SIGKILL)
    assert function.wait() == 69
    assert "the 4th time within a minute: giving up [worker_crashed]" in function.output()
    function.assert_nothing_left()


def test_the_shim_is_killed(started: Callable[..., Any], checkpoint: Path) -> None:
    """Nobody is left to reap them: worker and private agent end by themselves."""
    function = started(model=checkpoint).wait_ready()
    assert function.worker()
    assert function.agent()
    function.process.kill()
    assert function.wait() == -signal.SIGKILL
    function.until(lambda: not function.alive(), "worker and private agent end", 15)
    for path in function.temporary.iterdir():  # SIGKILL leaves the directory of the private agent's socket
        _remove_socket_directory(path)


def _remove_socket_directory(path: Path) -> None:
    assert [entry.name for entry in path.iterdir()] in ([], ["agent.sock"])
    for entry in path.iterdir():
        entry.unlink()
    path.rmdir()


def test_the_shim_is_killed_while_it_starts(started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(model=checkpoint)
    assert function.worker()
    assert function.agent()
    function.process.kill()
    function.wait()
    function.until(lambda: not function.alive(), "worker and private agent end", 15)
    for path in function.temporary.iterdir():
        if path.name.startswith("glowplug-model-"):
            continue
        _remove_socket_directory(path)


def test_the_private_agent_is_killed_while_the_function_starts(started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(model=checkpoint)
    os.kill(function.agent(), signal.SIGKILL)
    assert function.request("/v1/completions", COMPLETION).status == 200
    assert function.worker()


# --- the node's agent -------------------------------------------------------------------------------------------------


def test_the_nodes_agent_is_killed_and_comes_back(agent: Any, started: Callable[..., Any], checkpoint: Path) -> None:
    agent.may_fail = True
    serving = started(model=checkpoint, socket=agent.socket).wait_ready()
    worker = serving.worker()
    agent.kill()
    serving.says("this function goes on with the weights that it maps")
    _assert_answers(serving)
    waiting = started(model=checkpoint, socket=agent.socket)
    waiting.says("trying again")
    assert waiting.request("/_/health").status == 200
    assert waiting.request("/_/ready").json["phase"].startswith("waiting to try again: no cache agent answers")
    agent.start()
    assert waiting.request("/v1/completions", COMPLETION).status == 200
    _assert_answers(serving)
    assert serving.worker() == worker


def test_the_nodes_agent_is_stopped_while_it_loads(
    start_agent: Callable[..., Any], started: Callable[..., Any], checkpoint: Path
) -> None:
    """It stands still in the middle, is killed, and comes back: the start that waited succeeds."""
    agent = start_agent()
    agent.may_fail = True
    os.kill(agent.pid, signal.SIGSTOP)
    function = started(model=checkpoint, socket=agent.socket)
    function.wait_phase("lease")
    agent.kill()
    agent.start()
    assert function.request("/v1/completions", COMPLETION).status == 200


# --- at random --------------------------------------------------------------------------------------------------------


def test_kills_at_random_moments(
    serving: Callable[..., Any], checkpoint: Path, rounds: Callable[[int, int], int]
) -> None:
    """Worker or private agent, at any moment of a start or of serving; then a request must be answered."""
    chance = random.Random(20)
    left = rounds(2, 60)
    while left > 0:
        # Three deaths within a minute are forgiven, the fourth ends a function: a fresh one for every three.
        with serving(model=checkpoint, queue=8) as function:
            for _ in range(min(3, left)):
                left -= 1
                module = chance.choice(["runtime.worker.worker", "cache_agent.daemon"])
                moment = time.monotonic() + chance.uniform(0.0, 4.0)
                with suppress(OSError, http.client.HTTPException):
                    while time.monotonic() < moment:  # keeps it busy until then
                        function.request("/v1/completions", COMPLETION, seconds=max(0.1, moment - time.monotonic()))
                for pid, line in function.children().items():
                    if module in line:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                _assert_answers(function)


def test_sigterm_at_random_moments_loses_no_request(
    serving: Callable[..., Any], checkpoint: Path, rounds: Callable[[int, int], int]
) -> None:
    """Whoever was connected when SIGTERM came is answered, and the function ends with 0."""
    chance = random.Random(21)
    for _ in range(rounds(1, 30)):
        with serving(model=checkpoint) as function, closing(function.connect()) as connection:
            function.worker()
            moment = time.monotonic() + chance.uniform(0.0, 4.0)
            while time.monotonic() < moment:
                time.sleep(min(0.01, max(0.0, moment - time.monotonic())))
            connection.request("POST", "/v1/completions", json.dumps(COMPLETION), {"Content-Type": "application/json"})
            function.process.send_signal(signal.SIGTERM)
            assert connection.getresponse().status == 200
            assert function.wait() == 0
