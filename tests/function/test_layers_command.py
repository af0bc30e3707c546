"""`glowplug layers`: the files of supervisors, which of them are believed, and the output."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cache_agent.policy.keepalive import LayerCost
from runtime.commands.layers import layers
from runtime.config import FunctionConfig
from runtime.container.pod import Pod
from runtime.layers import published
from runtime.layers.rule import LayerRule
from runtime.layers.spawn import ForkRefused, Zygote
from runtime.process import wire as wires
from runtime.process.wire import Wire

LANG = LayerCost("lang", 3.0, 300_000_000)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(layers, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def ruled(layer: LayerCost, since: float, *gaps: float) -> LayerRule:
    """Return the rule of a layer that is idle since then, after idle times of these lengths."""
    rule, now = LayerRule(layer, 60.0), since - sum(gaps)
    for gap in gaps:
        rule.idle(now)
        now += gap
        rule.used(now)
    rule.idle(since)
    return rule


def test_says_what_is_held_for_how_long_and_why() -> None:
    since = time.monotonic() - 30.0
    lang_rule = ruled(LANG, since, *[60.0, 120.0] * 8)
    user_rule = ruled(LayerCost("user", 0.3, 100_000_000), since, *[500.0] * 8)
    supervisor = published.Published("pod", "chat", 60.0)
    supervisor.write(
        [
            published.entry("user", "absent", user_rule),
            published.entry("lang", "there", lang_rule),
        ]
    )
    text = shown("--why")
    assert f"pod chat (pid {os.getpid()}), ρ = 60 GB·s a second" in text
    lang = next(line for line in text.splitlines() if line.strip().startswith("lang"))
    assert lang.split() == ["lang", "idle", "30.0", "s", "300", "MB", "90.0", "s"]
    assert lang_rule.decision.why in text
    user = next(line for line in text.splitlines() if line.strip().startswith("user"))
    assert user.split() == ["user", "absent", "30.0", "s"]
    assert lang_rule.decision.why not in shown()
    (found,) = json.loads(shown("--json"))
    assert found["layers"][1]["hold"] == 120.0
    supervisor.close()
    assert "nothing holds layers here" in CliRunner().invoke(layers).output


def test_what_lasts_for_ever_and_what_is_used() -> None:
    free = LayerCost("bare", 1.0, 0)
    supervisor = published.Published("pod", "chat", 60.0)
    supervisor.write(
        [
            published.entry("bare", "there", ruled(free, time.monotonic())),
            published.entry("lang", "there", LayerRule(free, 60.0)),
        ]
    )
    text = shown("--why")
    assert "no end" in text
    assert "something runs on it; afterwards held: it takes no memory of its own" in text


def test_only_living_supervisors_are_believed(place: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (place / f"glowplug-layers-{ended.pid}.json").write_text(json.dumps({"pid": ended.pid, "layers": []}))
    (place / "glowplug-layers-1.json").write_text("no JSON")
    (place / "glowplug-layers-7.json").write_text(json.dumps({"pid": os.getpid(), "layers": []}))
    (place / "glowplug-layers-8.json").write_text("[1]")
    assert list(published.read()) == []


def test_nothing_is_written_through_a_link(place: Path) -> None:
    victim = place / "victim"
    victim.write_text("precious")
    (place / f"glowplug-layers-{os.getpid()}.new").symlink_to(victim)
    published.Published("pod", "chat", 60.0).write([])
    assert victim.read_text() == "precious"


def test_an_unwritable_place_hurts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    published.Published("pod", "chat", 60.0).write([{"level": "lang"}])


def test_a_pod_drops_what_a_periodic_function_does_not_pay_for() -> None:
    """The whole of a pod's bookkeeping, on a clock of the test's: calls every ten minutes, on the dot."""
    pod = Pod(FunctionConfig(model="/m/chat", layers="off"), lambda: "/no/agent", lambda _text: None)
    try:
        now, period = 1000.0, 600.0
        pod.worker_ready("llama", 3.0, False, now)
        pod.worker_bytes(1_000_000_000)
        assert not pod.wants_drop(now + 179.0), "little is known: held for the time that costs as much as a start"
        assert pod.wants_drop(now + 181.0)
        for _ in range(8):
            now += period
            pod.load(1, now)
            pod.load(0, now)
        assert pod.wants_drop(now + 1.0), "holding it for ten minutes costs more than a start"
    finally:
        pod.close()


def test_a_pod_publishes_what_becomes_of_its_worker() -> None:
    pod = Pod(FunctionConfig(model="/m/chat", layers="off", hold="user=5"), lambda: "/no/agent", lambda _text: None)
    try:
        pod.worker_ready("llama", 3.0, False, 100.0)
        pod.step(100.0)
        states: dict[str, Any] = {each["level"]: each for each in next(published.read())["layers"]}
        assert (states["user"]["state"], states["user"]["since"], states["user"]["hold"]) == ("idle", 100.0, 5.0)
        assert states["user"]["why"] == "held for 5 s", "no more than is true: the price has decided nothing"
        assert states["lang"]["state"] == "absent"
        pod.load(1, 101.0)
        pod.step(101.0)
        assert next(published.read())["layers"][0]["state"] == "used"
        pod.load(0, 102.0)
        assert pod.wants_drop(107.5)
        pod.worker_gone(107.5)
        pod.step(107.5)
        assert next(published.read())["layers"][0]["state"] == "absent"
    finally:
        pod.close()
    assert list(published.read()) == []


def test_a_worker_that_a_zygote_takes_with_it_is_refused_with_the_reason() -> None:
    """The zygote is played: it says that it is ready, and goes away when it is asked for a worker."""
    pod = Pod(FunctionConfig(model="/m/chat", layers="lang"), lambda: "/no/agent", lambda _text: None)
    process = subprocess.Popen(["sleep", "600"])
    ours, theirs = wires.pair()
    zygote = Wire(theirs)
    line, end = socket.socketpair()
    try:
        pod.worker_ready("llama", 3.0, False, 100.0)
        pod._lang.zygote = Zygote(Wire(ours), process.pid, os.pidfd_open(process.pid))
        zygote.send({"ready": "lang", "key": "lang", "seconds": 2.0, "bytes": 250_000_000})
        assert pod.step(100.1) == []
        asked = {"listener": line.fileno(), "line": line.fileno(), "environment": {}, "start_id": "s", "spans": []}
        number = pod.fork(101.0, **asked)
        received = zygote.receive()
        assert received is not None
        assert (received[0]["fork"], received[0]["why"]) == (number, "no model layer is there")
        for fd in received[1]:
            os.close(fd)
        zygote.close()
        assert pod.step(101.1) == [ForkRefused(number, "it went away (closed)")]
        assert pod.step(101.2) == [], "once"
        assert pod.fork(102.0, **asked) == 0, "there is none to ask"
        assert process.wait(30) != 0
    finally:
        pod.close()
        for each in (line, end):
            each.close()
        process.kill()
        process.wait()
