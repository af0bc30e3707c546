"""A container as a pool serves it, on a clock of the test's; the test plays shim, zygote and spares."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cache_agent.policy.keepalive import LayerCost
from runtime.config import FunctionConfig
from runtime.layers import identity
from runtime.layers.building import ZygoteLayer
from runtime.layers.rule import LayerRule
from runtime.layers.spawn import Forked, Zygote
from runtime.pool.models import Models
from runtime.pool.tenants import Tenant
from runtime.process import wire as wires
from runtime.process.messages import VERSION
from runtime.process.wire import Gone, Wire
from runtime.zygote.join import ContainerPlace

PLACE = ContainerPlace(
    pid=os.getpid(),
    container=1,
    uid=0,
    gid=0,
    groups=(),
    cgroup="",
    cgroups=(),
    limits=(),
    umask=0,
    oom=0,
    filtered=False,
)
ENVIRONMENT = {"GLOWPLUG_MODEL": "/m", "GLOWPLUG_LAYERS": "lang"}


class Played:
    """A tenant whose shim has introduced itself to a pool with a lang layer."""

    def __init__(self) -> None:
        config, made_of = FunctionConfig(layers="lang"), replace(identity.needs(), environment=())
        self.processes: list[subprocess.Popen[bytes]] = []
        ours, self.zygote = self._pair()
        self.lang = ZygoteLayer("lang", LayerRule(LayerCost("lang", 2.0, 1), 60.0), lambda _: None)
        self.lang.zygote = Zygote(ours, *self._process())
        self.models = Models(config, "/no/agent", made_of, self.lang, 8, lambda _: None)
        self.zygote.send({"ready": "lang", "key": "", "seconds": 2.0, "bytes": 1})
        assert self.models.step(0.0) == []
        ours, self.shim = self._pair()
        self.tenant = Tenant(ours, os.pidfd_open(os.getpid()), PLACE, config, self.models, lambda _: None)
        needs = {"machine": made_of.machine, "python": made_of.python, "base": made_of.base}
        self.shim.send({"wants": VERSION, **needs, "environment": ENVIRONMENT, "cwd": "/"})
        self.tenant.hear(0.0)
        assert heard(self.shim) == {"ready": "lang", "key": "", "seconds": 2.0, "bytes": 1}

    def _pair(self) -> tuple[Wire, Wire]:
        ours, theirs = wires.pair()
        return Wire(ours), Wire(theirs)

    def _process(self) -> tuple[int, int]:
        self.processes.append(subprocess.Popen(["sleep", "600"]))
        pid = self.processes[-1].pid
        return pid, os.pidfd_open(pid)

    def spare(self, now: float) -> Wire:
        """Have a spare forked; return the spare's end of its wire."""
        self.tenant.tend(now, room=True)
        received = self.zygote.receive()
        assert received is not None, "it was asked for"
        request, (wire, *others) = received
        for fd in others:
            os.close(fd)
        assert request["kind"] == "spare"
        assert self.tenant.forked(Forked(request["fork"], *self._process()), now)
        return Wire(socket.socket(fileno=wire))

    def ask(self, number: int, now: float) -> dict[str, Any]:
        """Ask for a worker; return the answer."""
        request = {
            "fork": number,
            "environment": ENVIRONMENT,
            "cwd": "/",
            "start_id": "s",
            "spans": [("shim", "exec", 1, 2)],
        }
        self.shim.send(request, [0, 0, 0, 1, 2])
        self.tenant.hear(now)
        return heard(self.shim)

    def close(self) -> None:
        self.tenant.close(1e6, ended=True)
        self.models.close()
        for each in (self.shim, self.zygote):
            each.close()
        for process in self.processes:
            process.kill()
            process.wait()


def heard(wire: Wire) -> dict[str, Any]:
    received = wire.receive()
    assert received is not None
    for fd in received[1]:
        os.close(fd)
    return received[0]


@pytest.fixture
def played() -> Iterator[Played]:
    made = Played()
    yield made
    made.close()


def test_a_spare_serves_while_the_zygote_that_forked_it_is_built_again(played: Played) -> None:
    spare = played.spare(1.0)
    played.zygote.close()
    assert played.models.step(2.0) == []
    assert not played.lang.ready
    played.tenant.tend(2.0, room=True)
    assert played.tenant.spare is not None, "what it was forked with is its own"
    answer = played.ask(7, 3.0)
    assert (answer["forked"], answer["pid"]) == (7, played.processes[-1].pid)
    assert heard(spare)["why"] == ""
    spare.close()
    assert played.tenant.ended(played.processes[-1].pid, 0, 4.0)
    assert heard(played.shim) == {"ended": played.processes[-1].pid, "status": 0}
    assert played.ask(8, 5.0) == {"refused": 8, "why": "no zygote of the pool is ready"}


def test_a_spare_is_held_for_its_price_and_where_there_is_room(played: Played) -> None:
    played.tenant.tend(1.0, room=False)
    assert played.zygote.receive() is None
    spare = played.spare(1.0)
    spare.send({"parked": 60_000_000, "seconds": 0.1})  # worth 100 s at 60 GB·s a second
    played.tenant.tend(99.0, room=False)
    assert played.tenant.spare is not None, "it needs no further room"
    played.tenant.tend(101.0, room=True)
    assert played.tenant.spare is None
    assert played.processes[-1].wait(30) != 0
    with pytest.raises(Gone):
        spare.receive()
    spare.close()
    assert played.zygote.receive() is None, "no other is forked, either"


def test_a_container_that_cannot_be_entered_is_dismissed(played: Played) -> None:
    spare = played.spare(1.0)
    spare.send({"failed": "it could not enter the container: [Errno 1]"})
    played.tenant.tend(2.0, room=True)
    assert played.tenant.left
    assert heard(played.shim) == {"failed": "it could not enter the container: [Errno 1]"}
    spare.close()
