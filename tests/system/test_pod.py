"""Layers of one container: an idle worker goes and comes back from the deepest layer, and nothing is lost meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

GONE = "the worker was idle and is gone"
HANDLER = """
    import ctypes
    import os
    import random
    import threading
    import time

    import numpy

    hooks = []
    drawn = random.random(), float(numpy.random.rand()), os.urandom(8).hex()


    def load(context):
        hooks.append("load")


    def after_fork(context):
        hooks.append("after_fork")


    def handle(event, context):
        match event.path:
            case "/about":
                return {"pid": os.getpid(), "drawn": drawn, "hooks": hooks, "threads": event.query.get("n")}
            case "/generate":
                return context.model.generate("once", max_tokens=8, temperature=0, ignore_eos=True)
            case "/slow":
                time.sleep(float(event.query["seconds"]))
            case "/exit":
                os._exit(3)
            case "/segfault":
                ctypes.string_at(0)
            case "/fork":
                if not os.fork():
                    os._exit(0)
                os.wait()
            case "/threads":
                threading.Thread(target=time.sleep, args=(600,)).start()
        return "done"
    """


def _layer(function: Any, level: str) -> None:
    function.says(f"layer {level} is warm")


def _gone(function: Any, times: int = 1) -> None:
    function.until(lambda: function.output().count(GONE) >= times, f"the worker is gone, the {times}. time")


@pytest.fixture(scope="module")
def pod(serving: Callable[..., Any], checkpoint: Path) -> Iterator[Any]:
    """A function whose workers go half a second after their last request, and whose zygotes stay."""
    hold = "user=0.5,model=inf,lang=inf"
    with serving(handler=HANDLER, model=checkpoint, layers="model", hold=hold, dram="64M") as function:
        function.first = function.request("/generate")
        _gone(function)
        _layer(function, "model")
        yield function


def _wait_parked(function: Any) -> None:
    def parked() -> bool:
        return bool(function.request("/_/ready").json["state"] == "parked")

    function.until(parked, "no worker is there")


def test_the_next_request_is_a_fork_away_and_says_so(pod: Any) -> None:
    assert pod.first.headers["X-Glowplug-Start"] == "cold"
    _wait_parked(pod)
    again = pod.request("/generate")
    assert again.headers["X-Glowplug-Start"] == "model"
    assert again.body == pod.first.body, "the very same tokens"
    names = [span["name"] for span in pod.spans()]
    assert "fork from model" in names
    assert "imports" not in names


def test_every_worker_is_its_own(pod: Any) -> None:
    seen = set()
    for _ in range(3):
        _wait_parked(pod)
        about = pod.request("/about").json
        assert about["hooks"] == ["load", "after_fork"]
        seen.update(map(str, (about["pid"], *about["drawn"])))
    assert len(seen) == 12


def test_probes_of_a_parked_function_are_answered_without_a_worker(pod: Any) -> None:
    _wait_parked(pod)
    for _ in range(5):
        assert pod.request("/_/health").json == {"status": "ok"}
        assert pod.request("/_/ready").status == 200
    assert "glowplug-worker" not in pod.descendants().values()


def test_no_request_is_lost_while_workers_come_and_go(pod: Any, rounds: Callable[[int, int], int]) -> None:
    """Clients ask at all times around the end of the hold; each is answered, whoever is there."""
    count = rounds(4, 100)

    def client(number: int) -> list[int]:
        answers = []
        for turn in range(count):
            answers.append(pod.request("/about").status)
            time.sleep(0.45 + 0.02 * ((7 * turn + 3 * number) % 10))  # not to wait for anything: it is the load
        return answers

    with ThreadPoolExecutor(3) as clients:
        answers = [status for each in clients.map(client, range(3)) for status in each]
    assert answers == [200] * (3 * count)


def test_a_request_that_is_being_served_keeps_its_worker(pod: Any) -> None:
    _wait_parked(pod)
    assert pod.request("/slow?seconds=1.5").body == b"done"


def test_a_crashed_worker_is_replaced_by_a_fork(pod: Any) -> None:
    for path in ("/exit", "/segfault"):
        with contextlib.suppress(Exception):
            pod.request(path)
        answer = pod.request("/generate")
        assert (answer.status, answer.headers["X-Glowplug-Start"]) == (200, "model")
        assert pod.request("/fork").body == b"done"
        assert pod.request("/threads").body == b"done"


def test_zygotes_that_hang_or_die_are_replaced(serving: Callable[..., Any], checkpoint: Path) -> None:
    """The one that is stopped is killed after a second; the worker it forked goes on serving."""
    settings = {"layers": "lang", "hold": "user=inf,lang=inf"}
    with serving(handler=HANDLER, model=checkpoint, **settings) as function:
        function.request("/about")
        _layer(function, "lang")
        booted = function.worker()
        os.kill(booted, signal.SIGKILL)
        function.until(lambda: booted not in function.descendants(), "the first worker is gone")
        before = function.request("/about")
        assert before.headers["X-Glowplug-Start"] == "lang"
        zygote = next(pid for pid, name in function.descendants().items() if name == "glowplug-zygote")
        os.kill(zygote, signal.SIGSTOP)
        function.says("its zygote was silent for 1 s and was killed")
        assert function.request("/about").json["pid"] == before.json["pid"]
        os.kill(before.json["pid"], signal.SIGKILL)
        answer = function.request("/about")
        assert (answer.status, answer.headers["X-Glowplug-Start"]) == (200, "cold")


def test_dropped_layers_give_their_memory_back(serving: Callable[..., Any], checkpoint: Path) -> None:
    hold = "user=0.2,model=0.5,lang=1"
    with serving(handler=HANDLER, model=checkpoint, layers="model", hold=hold) as function:
        function.request("/about")
        _layer(function, "lang")
        function.says("layer lang is dropped")

        def left() -> list[str]:
            return [name for name in function.descendants().values() if name.startswith("glowplug-")]

        function.until(lambda: not left(), "neither worker nor zygote is left")
        answer = function.request("/about")
        assert (answer.status, answer.headers["X-Glowplug-Start"]) == (200, "cold")


def test_an_agent_that_restarts_costs_the_model_layer_and_no_answer(pod: Any) -> None:
    os.kill(pod.agent(), signal.SIGKILL)
    for _ in range(3):
        answer = pod.request("/generate")
        assert (answer.status, answer.body) == (200, pod.first.body)


def test_sigterm_ends_a_parked_function_with_zero(serving: Callable[..., Any], checkpoint: Path) -> None:
    hold = "user=0.2,lang=inf"
    with serving(handler=HANDLER, model=checkpoint, layers="lang", hold=hold, drain_linger=1) as function:
        function.request("/about")
        _layer(function, "lang")
        _wait_parked(function)
        function.process.send_signal(signal.SIGTERM)
        answer = function.request("/about")  # the platform goes on routing for a while
        assert answer.headers["X-Glowplug-Start"] == "lang"
        assert function.wait() == 0


def test_a_container_that_is_killed_leaves_nothing(serving: Callable[..., Any], checkpoint: Path) -> None:
    hold = "user=inf,model=inf,lang=inf"
    with serving(handler=HANDLER, model=checkpoint, layers="model", hold=hold) as function:
        function.request("/about")
        _layer(function, "model")
        os.kill(function.worker(), signal.SIGKILL)
        function.until(lambda: function.request("/about").status == 200, "a forked worker serves")
        os.kill(function.pid, signal.SIGKILL)
        function.wait()
        function.until(lambda: not function.alive(), f"its processes end, and not {function.descendants()}", 15)
        for left in function.temporary.iterdir():
            if left.name.startswith(
                f"glowplug-layers-{function.pid}."
            ):  # what is said of layers goes with the container
                left.unlink()
                continue
            # A private agent that was not stopped leaves its directory.
            for path in sorted(left.rglob("*"), reverse=True):
                path.unlink()
            left.rmdir()
