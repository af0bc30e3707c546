"""Reports of a supervisor's layers to its agent: on changes, repeated while the supervisor lives, and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import ProtocolError
from cache_agent.wire.layers import LayersReport
from runtime.layers import reporter
from runtime.layers.reporter import LayerReporter

HEAD = {"mode": "pod", "name": "chat", "rho": 60.0, "pid": 1}
LANG = {
    "level": "lang",
    "state": "used",
    "since": None,
    "seconds": 3.0,
    "bytes": 5,
    "why": "",
    "unknown": "passed over",
}
SOON = 120.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "_SETTLED", 0.0)
    monkeypatch.setattr(reporter, "_APART", 0.0)


def test_an_agent_knows_what_it_was_told(start_local_agent: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    agent = start_local_agent()

    def states() -> list[str]:
        return [layer.state for function in agent.client.status().layers for layer in function.layers]

    word = LayerReporter(lambda: agent.client, HEAD)
    word.report([LANG])
    eventually(lambda: states() == ["used"], SOON)
    word.report([{**LANG, "state": "idle", "since": time.monotonic()}, LANG])
    eventually(lambda: states() == ["idle", "used"], SOON)
    word.close()
    assert states() == []


class Recorder(CacheClient):
    """A client that counts the layers of each report."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__("/no/agent")
        self.told: list[int] = []
        self.fault = fault

    def tell_layers(self, told: LayersReport) -> None:
        self.told.append(len(told.layers))
        if self.fault is not None:
            raise self.fault


def test_it_is_said_again_while_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr(reporter, "_AGAIN", 0.01)
    client = Recorder()
    word = LayerReporter(lambda: client, HEAD)
    word.report([LANG])
    eventually(lambda: len(client.told) > 3, SOON)
    word.close()
    assert (set(client.told[:-1]), client.told[-1]) == ({1}, 0)


@pytest.mark.parametrize("fault", [ProtocolError("an older agent"), OSError("gone")])
def test_an_agent_that_will_not_hear_is_left_alone(fault: Exception, eventually: Callable[..., Any]) -> None:
    client = Recorder(fault)
    word = LayerReporter(lambda: client, HEAD)
    for count in (1, 2):
        word.report([LANG] * count)
        eventually(lambda count=count: count in client.told, SOON)
    word.close()
    assert client.told[-1] == 0


def test_nothing_is_said_by_one_that_never_had_layers() -> None:
    client = Recorder()
    LayerReporter(lambda: client, HEAD).close()
    assert client.told == []
