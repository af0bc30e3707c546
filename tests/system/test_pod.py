"""Layers of one container: an idle worker goes and comes back from the deepest layer, and nothing is lost meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
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

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal.restype = ctypes.c_void_p
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
            case "/hoard":
                hoard = []
                while True:
                    hoard.append(b"1" * (16 << 20))
            case "/deaf":
                libc.signal(15, ctypes.c_void_p(1))  # SIG_IGN, as only C code can set it outside of the main thread
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
    settings = {"layers": "model", "hold": "user=0.5,model=inf,lang=inf", "drain_linger": 1}
    with serving(handler=HANDLER, model=checkpoint, dram="64M", **settings) as function:
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


@pytest.fixture
def memory_limit() -> Iterator[Callable[[int, list[int]], None]]:
    """Puts processes into a memory cgroup of their own, and back at the end."""
    v1 = Path("/sys/fs/cgroup/memory")
    root = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
    line = next(
        line
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if (":memory:" in line if v1.is_dir() else line.startswith("0::"))
    )
    own = root / line.split(":", 2)[2].lstrip("/")
    place = root / f"glowplug-test-{os.getpid()}"
    try:
        place.mkdir()
        limit = place / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")
        limit.read_text()
    except OSError as error:
        with contextlib.suppress(OSError):
            place.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")

    def move(group: Path, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (group / "cgroup.procs").write_text(str(pid))

    def limited(size: int, pids: list[int]) -> None:
        limit.write_text(str(size))
        move(place, pids)

    yield limited
    deadline = time.monotonic() + 30
    while left := (place / "cgroup.procs").read_text().split():
        assert time.monotonic() < deadline, left
        move(own, [int(pid) for pid in left])
    place.rmdir()


@pytest.fixture(scope="module")
def lang_pod(serving: Callable[..., Any], checkpoint: Path) -> Iterator[Any]:
    """One whose workers go soon, and whose lang layer stays."""
    settings = {"layers": "lang", "hold": "user=0.3,lang=inf", "drain_grace": 0}
    with serving(handler=HANDLER, model=checkpoint, **settings) as function:
        function.request("/about")
        _layer(function, "lang")
        yield function


def test_a_handler_that_takes_all_memory_ends_its_worker_only(lang_pod: Any, memory_limit: Callable[..., None]) -> None:
    """The container's limit: what was there before the test counts where it was."""
    _wait_parked(lang_pod)
    memory_limit(400 << 20, lang_pod.alive())
    with contextlib.suppress(OSError, http.client.HTTPException):
        lang_pod.request("/hoard")
    answer = lang_pod.request("/generate")
    assert (answer.status, answer.headers["X-Glowplug-Start"]) == (200, "lang")
    assert "killed by SIGKILL (if nobody sent it, the container's memory limit is too small)" in lang_pod.output()


def test_zygotes_that_hang_or_die_are_replaced(lang_pod: Any) -> None:
    """The one that is stopped is killed after a second; the worker it forked goes on serving."""
    _wait_parked(lang_pod)
    with contextlib.closing(lang_pod.connect()) as connection:  # as long as it is there, the worker stays
        connection.request("GET", "/about")
        before = connection.getresponse()
        pid = json.loads(before.read())["pid"]
        assert before.headers["X-Glowplug-Start"] == "lang"
        zygote = next(pid for pid, name in lang_pod.descendants().items() if name == "glowplug-zygote")
        os.kill(zygote, signal.SIGSTOP)
        lang_pod.says("its zygote was silent for 1 s and was killed")
        assert lang_pod.request("/about").json["pid"] == pid
        os.kill(pid, signal.SIGKILL)
    answer = lang_pod.request("/about")
    assert (answer.status, answer.headers["X-Glowplug-Start"]) == (200, "cold")


def test_a_worker_that_ignores_sigterm_is_killed_when_the_grace_is_over(lang_pod: Any) -> None:
    with contextlib.closing(lang_pod.connect()) as connection:
        connection.request("GET", "/deaf")
        assert connection.getresponse().read() == b"done"
        assert lang_pod.stop() == 128 + signal.SIGKILL
    assert "the worker did not stop in time and is killed" in lang_pod.output()


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


def test_a_container_that_is_killed_leaves_nothing(serving: Callable[..., Any], checkpoint: Path) -> None:
    hold = "user=0.3,model=inf,lang=inf"
    with serving(handler=HANDLER, model=checkpoint, layers="model", hold=hold) as function:
        function.request("/about")
        _layer(function, "model")
        _wait_parked(function)
        with contextlib.closing(function.connect()) as connection:
            connection.request("GET", "/about")
            assert connection.getresponse().status == 200, "a forked worker serves"
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


def test_sigterm_ends_a_parked_function_with_zero(pod: Any) -> None:
    """The last of the tests with this function."""
    _wait_parked(pod)
    pod.process.send_signal(signal.SIGTERM)
    answer = pod.request("/about")  # the platform goes on routing for a while
    assert answer.headers["X-Glowplug-Start"] in ("model", "lang")  # the agent restarted before
    assert pod.wait() == 0
