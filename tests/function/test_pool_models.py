"""A pool's model layers on a clock of the test's: which are built, for whom, for how long; the zygotes are played."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cache_agent.policy.keepalive import LayerCost
from cache_agent.tiers.fake import FakeOrigin
from runtime.config import FunctionConfig
from runtime.layers.building import ZygoteLayer
from runtime.layers.keys import Needs
from runtime.layers.rule import LayerRule
from runtime.layers.spawn import BUILD, SILENCE, Zygote
from runtime.pool.models import Models
from runtime.process import wire as wires
from runtime.process.wire import Gone, Wire

ONE, OTHER = "fake://m/one", "fake://m/other"
LANG = Needs(machine="m", python="p", base="b", domain="d", preload=("llama",))


class Played:
    """`models` with an agent that has two of them, and a lang layer that forks what the test wants."""

    def __init__(self, agent: Any, most: int, **settings: Any) -> None:
        self.said: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told: list[Wire] = []
        config = FunctionConfig(**settings)
        self.lang = ZygoteLayer("lang", LayerRule(LayerCost("lang", 2.0, 1), 60.0), lambda _: None)
        self.models = Models(config, str(agent.socket), LANG, self.lang, most, self.said.append)
        self.build_lang()

    def build_lang(self) -> None:
        """Have a lang layer built, for which the test answers."""
        ours, theirs = wires.pair()
        self.lang.zygote, self.forks = Zygote(Wire(ours), *self.process()), Wire(theirs)

    def announce(self) -> None:
        """Say that the lang layer is ready."""
        self.forks.send({"ready": "lang", "key": "", "seconds": 2.0, "bytes": 1})

    def process(self) -> tuple[int, int]:
        """Start a process that can be killed; return its pid and a pidfd."""
        self.processes.append(subprocess.Popen(["sleep", "600"]))
        pid = self.processes[-1].pid
        return pid, os.pidfd_open(pid)

    def step(self, now: float) -> None:
        """Take one turn of a pool, after its zygotes have beaten."""
        for each in [self.forks, *self.told]:
            with contextlib.suppress(Gone):
                each.send({"beat": 1})
        self.models.step(now)

    def serve(self, uri: str, begin: float, end: float) -> None:
        """Have a worker with this model come and go; after the first one there is a lang layer, too."""
        self.models.asked(uri, begin)
        self.models.began(uri, begin)
        self.step(end)
        self.models.ended(uri, end)
        self.announce()

    def lend(self, now: float) -> dict[str, Any]:
        """Step until a layer was asked for; return the request."""
        for _ in range(200):
            self.step(now)
            if (received := self.forks.receive()) is not None:
                message, (told, *segments) = received
                self.told.append(Wire(socket.socket(fileno=told)))
                for fd in segments:
                    os.close(fd)
                return message
            select.select([*self.models.fds()], [], [], 0.1)
        raise AssertionError(f"no layer was asked for: {self.said}")

    def forked(self, number: int) -> None:
        pid, pidfd = self.process()
        self.forks.send({"forked": number, "pid": pid}, [pidfd])
        os.close(pidfd)

    def build(self, now: float, seconds: float = 0.2, size: int = 50_000_000) -> None:
        request = self.lend(now)
        assert (request["kind"], request["size"] > 0) == ("zygote", True)
        self.forked(request["fork"])
        self.told[-1].send({"ready": "model", "key": "k", "seconds": seconds, "bytes": size})
        self.step(now)

    def quiet(self, now: float) -> bool:
        """Return whether nothing was asked for by then, and nothing is under way."""
        self.step(now)
        return self.forks.receive() is None and all(each["state"] != "building" for each in self.models.report())

    def close(self) -> None:
        self.models.close()
        self.forks.close()
        for each in self.told:
            each.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def played(start_local_agent: Callable[..., Any], checkpoint_files: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    agent = start_local_agent({uri: FakeOrigin(uri, checkpoint_files()) for uri in (ONE, OTHER)})
    with contextlib.ExitStack() as stack:

        def make(most: int = 8, **settings: Any) -> Played:
            made = Played(agent, most, **settings)
            stack.callback(made.close)
            return made

        yield make


def test_a_model_is_built_once_somebody_has_run_with_it(played: Callable[..., Any]) -> None:
    """The pool leases as itself: it must not fetch a model that the agent would have refused to the function."""
    pool = played()
    pool.announce()
    pool.models.asked(ONE, 0.0)
    pool.models.began(ONE, 0.0)
    assert pool.quiet(1.9)
    pool.models.ended(ONE, 1.9)
    assert pool.quiet(600.0), "its worker did not live"
    pool.models.asked(ONE, 1000.0)
    pool.models.began(ONE, 1000.0)
    pool.build(1002.1)
    layer, why = pool.models.deepest(ONE)
    assert layer is not None
    assert (layer.uri, why) == (ONE, "")
    assert pool.models.deepest(OTHER) == (pool.lang, "no model layer is there")
    assert pool.models.deepest("") == (pool.lang, "")


def test_an_idle_model_is_held_for_its_price_and_comes_back(played: Callable[..., Any]) -> None:
    pool = played(start_price=60.0)
    pool.serve(ONE, 0.0, 10.0)
    pool.build(10.0)
    (entry,) = pool.models.report()
    held = entry["hold"]
    assert held == pytest.approx(60.0 * 0.2 / (entry["bytes"] / 1e9))
    assert entry["bytes"] > 50_000_000, "the weights that the lease keeps are counted, too"
    layer, _ = pool.models.deepest(ONE)
    pool.step(10.0 + held - 1.0)
    assert pool.models.deepest(ONE)[0] is layer
    pool.step(10.0 + held + 1.0)
    assert pool.models.deepest(ONE)[0] is pool.lang
    assert pool.processes[-1].wait(30) != 0
    assert pool.quiet(2000.0), "nobody asks for it"
    pool.models.asked(ONE, 3000.0)
    pool.models.began(ONE, 3000.0)
    pool.build(3000.0)


def test_there_are_as_many_as_may_be(played: Callable[..., Any]) -> None:
    pool = played(most=1)
    pool.serve(ONE, 0.0, 10.0)
    pool.build(10.0)
    pool.serve(OTHER, 11.0, 20.0)
    assert pool.quiet(20.0)
    assert pool.models.deepest(OTHER)[0] is pool.lang


def test_what_cannot_be_built_is_tried_again_later_and_later(played: Callable[..., Any]) -> None:
    pool = played()
    pool.serve(ONE, 0.0, 10.0)
    request = pool.lend(10.0)
    pool.forks.send({"refused": request["fork"], "why": "it has 2 threads"})
    assert pool.quiet(10.0)
    assert pool.quiet(39.0)
    request = pool.lend(41.0)
    pool.forks.send({"refused": request["fork"], "why": "it has 2 threads"})
    assert pool.quiet(41.0)
    assert pool.quiet(100.0)
    assert [line.rpartition("; ")[2] for line in pool.said] == ["tried again after 30 s", "tried again after 60 s"]


def test_another_revision_or_a_lost_zygote_end_a_layer(played: Callable[..., Any]) -> None:
    pool = played()
    pool.serve(ONE, 0.0, 10.0)
    pool.build(10.0)
    layer, _ = pool.models.deepest(ONE)
    layer.drop("the agent has another revision")
    assert pool.models.deepest(ONE)[0] is pool.lang
    pool.build(11.0)
    pool.told[-1].close()
    pool.step(12.0)
    assert "its zygote was lost" in pool.said[-1]
    assert pool.models.deepest(ONE)[0] is pool.lang


def test_a_lang_layer_that_goes_while_it_forks_leaves_nothing_half_built(played: Callable[..., Any]) -> None:
    pool = played()
    pool.serve(ONE, 0.0, 10.0)
    pool.lend(10.0)
    pool.forks.close()
    pool.step(11.0)
    assert [each["state"] for each in pool.models.report()] == ["absent"]
    assert pool.said[-1].endswith("the layer below it is gone; tried again after 30 s")
    pool.build_lang()
    pool.announce()
    pool.build(41.0)
    assert pool.models.deepest(ONE)[0] is not pool.lang


def test_a_zygote_hangs_by_the_clock_that_the_pool_goes_by(played: Callable[..., Any]) -> None:
    """The machine may have been booted a minute ago, or ten years."""
    pool = played()
    pool.serve(ONE, 0.0, 10.0)
    pool.build(10.0)
    for now, there in ((10.0 + SILENCE, True), (10.1 + SILENCE, False)):
        pool.forks.send({"beat": 1})
        pool.models.step(now)
        assert (pool.models.deepest(ONE)[0] is not pool.lang) == there
    assert "its zygote was silent for 1 s and was killed" in pool.said[-1]
    assert pool.processes[-1].wait(30) != 0
    request = pool.lend(100.0)
    pool.forked(request["fork"])
    for now in (100.0, 100.0 + BUILD):
        pool.step(now)
        assert [each["state"] for each in pool.models.report()] == ["building"]
    pool.step(100.1 + BUILD)
    assert "its zygote was not ready after 120 s and was killed" in pool.said[-1]
