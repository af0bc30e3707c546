"""A pool's decisions about a container's worker, on a clock of the test's, and their effect in the shim."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.config import FunctionConfig
from runtime.container.node import NodeMode
from runtime.container.supply import Order, Supply
from runtime.errors import BadConfig
from runtime.pool.serving import Serving
from runtime.process import wire as wires
from runtime.process.children import Child
from runtime.process.messages import VERSION
from runtime.process.wire import Wire


def serving(**settings: str) -> Serving:
    environment = {f"GLOWPLUG_{name.upper()}": value for name, value in settings.items()}
    return Serving({"GLOWPLUG_MODEL": "s3://m/chat", **environment}, "/home/app")


def tell(worker: Serving, now: float, **message: Any) -> None:
    assert worker.tells(message, now, forked=True)


def test_an_idle_worker_goes_after_its_hold_and_is_told_again() -> None:
    worker = serving(hold="user=5")
    worker.asked(90.0)
    assert worker.wish(99.0) == ""
    tell(worker, 100.0, serves=0.2)
    assert worker.wish(104.9) == ""
    assert worker.wish(105.1) == "retire"
    assert worker.wish(105.5) == "", "the wish is not repeated yet"
    tell(worker, 105.6, load=1)
    assert worker.wish(120.0) == "", "it was needed, after all"
    tell(worker, 130.0, load=0)
    assert worker.wish(135.1) == "retire"
    assert worker.wish(136.2) == "retire"
    worker.ended()
    tell(worker, 136.3, parked=1)
    assert worker.wish(10_000.0) == "", "it has gone"
    assert worker.report()["state"] == "absent"


def test_what_a_periodic_function_does_not_pay_for_goes_at_once() -> None:
    """Calls every ten minutes, on the dot; ρ is the function's own."""
    worker, now, period = serving(start_price="60"), 1000.0, 600.0
    worker.asked(now)
    tell(worker, now, serves=3.0)
    tell(worker, now, bytes=1_000_000_000)
    assert worker.wish(now + 179.0) == "", "little is known: held for the time that costs as much as a start"
    for _ in range(8):
        now += period
        tell(worker, now, load=1)
        tell(worker, now, load=0)
    assert worker.wish(now + 1.0) == "retire", "holding it for ten minutes costs more than a start"
    dear = serving(start_price="100000")
    dear.asked(0.0)
    tell(dear, 0.0, serves=3.0)
    assert dear.wish(600.0) == ""


def test_the_model_is_what_the_function_has_set() -> None:
    assert serving().model == "s3://m/chat"
    assert serving(model="models/chat").model == "file:///home/app/models/chat"
    assert serving(layers="lang").model == ""
    assert serving(private_weights="1").model == ""
    with pytest.raises(BadConfig, match="GLOWPLUG_HOLD"):
        serving(hold="user=-1")


@pytest.mark.parametrize(
    "message",
    [
        {}, {"serves": "3"}, {"serves": float("nan")}, {"serves": float("inf")}, {"serves": -1.0}, {"load": -1},
        {"load": [1, 2]}, {"bytes": -1}, {"bytes": 1 << 70}, {"parked": 2}, {"retire": 1},
    ],
)  # fmt: skip
def test_what_no_shim_tells_is_refused(message: dict[str, Any]) -> None:
    worker = serving()
    assert not worker.tells(message, 1.0, forked=True)
    assert worker.report()["state"] == "absent"


# --- a shim's side ----------------------------------------------------------------------------------------------------


class PlayedPool:
    """The pool's end of the socket, played by the test."""

    def __init__(self, place: Path) -> None:
        self.path = place / "pool.sock"
        self.listener = wires.listen(str(self.path))
        self.wires: list[Wire] = []

    def accept(self) -> Wire:
        self.wires.append(Wire(self.listener.accept()[0]))
        return self.wires[-1]

    def close(self) -> None:
        for each in self.wires:
            each.close()
        self.listener.close()


@pytest.fixture
def played(tmp_path: Path) -> Iterator[PlayedPool]:
    made = PlayedPool(tmp_path)
    yield made
    made.close()


def heard(wire: Wire) -> dict[str, Any]:
    received = wire.receive()
    assert received is not None
    return received[0]


def test_a_pool_that_comes_back_learns_of_the_worker_that_is_there(played: PlayedPool) -> None:
    node = NodeMode(FunctionConfig(model="/m", pool=str(played.path)))
    node.worker_ready("llama", 0.25, True, 0.0)
    node.worker_bytes(5)
    node.load(1, 0.0)
    node.load(0, 0.0)
    node.step(1.0)
    first = played.accept()
    introduced = heard(first)
    assert introduced.keys() == {"wants", "machine", "python", "base", "environment", "cwd"}
    assert introduced["wants"] == VERSION
    assert introduced["environment"] == dict(os.environ)
    assert [heard(first) for _ in range(3)] == [{"serves": 0.25}, {"bytes": 5}, {"load": 0}]

    first.send({"wish": "retire"})
    node.step(1.1)
    assert node.wants_drop(1.1)
    assert not node.wants_drop(1.2), "once"
    first.send({"wish": "retire"})
    node.step(1.3)
    node.worker_gone(1.4)
    assert heard(first) == {"parked": 1}
    assert not node.wants_drop(1.4), "the wish was for the worker that has gone"
    first.send({"wish": "start"})  # as a pool of an older version does
    assert (node.step(1.5), node.wants_drop(1.5), node.why) == ([], False, "")

    first.close()
    node.step(2.0)
    assert node.why.startswith("the pool is gone")
    node.step(1e9)
    second = played.accept()
    assert "wants" in heard(second)
    assert heard(second) == {"parked": 1}
    node.close()


def test_a_pool_that_refuses_is_not_waited_for(
    played: PlayedPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    config = FunctionConfig(model="/m", pool=str(played.path))
    node = NodeMode(config)
    node.worker_ready("llama", 0.25, True, 0.0)
    node.step(1.0)
    wire = played.accept()
    notes: list[str] = []
    ours, theirs = socket.socketpair()
    with ours, socket.create_server(("127.0.0.1", 0)) as listener:
        supply = Supply(config, listener, lambda: "/no/agent", lambda why, _: notes.append(why), lambda _: None)
        supply.layers = node
        assert supply.ask(Order(theirs, [], "start", [])) is None
        assert [*heard(wire)][:1] == ["wants"]
        assert heard(wire) == {"serves": 0.25}
        received = wire.receive()
        assert received is not None
        for fd in received[1]:
            os.close(fd)
        wire.send({"refused": received[0]["fork"], "why": "it has 2 threads"})
        (worker,) = supply.step(0.0)  # long before the time in which the pool has to answer is over
        assert notes == ["not forked: it has 2 threads"]
        assert isinstance(worker, Child)
        assert os.waitpid(worker.pid, 0) == (worker.pid, 0)
        worker.close()
        supply.close()


def test_a_worker_that_no_pool_can_enter_for_looks_for_none(
    played: PlayedPool, readable: Callable[[Any, float], bool]
) -> None:
    node = NodeMode(FunctionConfig(model="/m", pool=str(played.path)))
    node.worker_ready("llama", 0.25, True, 0.0)
    node.step(0.0)
    wire = played.accept()
    wire.dismiss({"failed": "it could not enter the container: [Errno 1]"})
    node.step(1.0)
    node.step(1e9)
    assert not readable(played.listener, 0.0)
    node.close()
