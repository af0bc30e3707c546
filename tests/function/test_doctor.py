"""The findings of `glowplug doctor`: each check against the real thing, where there is one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cache_agent.config import AgentConfig
from cache_agent.ledger import Ledger, Span
from cache_agent.wire.operations import (
    ImageStatus,
    ModelStatus,
    QuarantineStatus,
    SsdStatus,
    Start,
    StatusReply,
    TierStatus,
)
from runtime import cli
from runtime.commands import doctor
from runtime.config import FunctionConfig
from runtime.http.application import Application
from runtime.http.lifecycle import Lifecycle


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove all settings and credentials but those of a test."""
    for name in list(os.environ):
        if name.startswith(("GLOWPLUG_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GLOWPLUG_SOCKET", str(tmp_path / "none.sock"))


@pytest.fixture
def nobody() -> Iterator[int]:
    """Return a port without a listener."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["doctor", *arguments])


def found(result: Result) -> dict[str, Any]:
    return {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}


def test_a_machine_without_an_agent_is_not_broken(nobody: int) -> None:
    result = run("--json")
    assert result.exit_code == 0
    checks = found(result)
    assert {"versions", "base set", "memory", "huge pages", "open files", "Redis", "S3", "agent"} <= checks.keys()
    assert checks["agent"]["state"] == "note"
    assert "glowplug agent serve" in checks["agent"]["advice"]
    nowhere = ("--url", f"http://127.0.0.1:{nobody}")
    assert json.loads(run("--json", *nowhere).stdout)["last_start"] is None
    assert "No start is known" in run(*nowhere).stdout


def test_whatever_is_to_be_done_is_said() -> None:
    for check in found(run("--json")).values():
        assert check["text"]
        assert check["advice"] or check["state"] == "ok", check


def test_what_is_broken_is_the_exit_code(nobody: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWPLUG_REDIS_URL", f"redis://127.0.0.1:{nobody}/0")
    result = run("--json")
    assert result.exit_code == 1
    assert found(result)["Redis"]["state"] == "failed"
    text = run().stdout
    assert "✗ Redis" in text
    assert "nodes serve on" in text


def test_a_budget_beyond_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWPLUG_DRAM", "900T")
    memory = found(run("--json"))["memory"]
    assert (memory["state"], "lower GLOWPLUG_DRAM" in memory["advice"]) == ("warning", True)


def test_what_looks_like_a_setting_and_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A former setting, one with a slip in it, and those that are."""
    monkeypatch.setenv("GLOWPLUG_TEST_S3_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GLOWPLUG_SLOTS", "4")
    assert found(run("--json"))["settings"]["state"] == "ok"
    monkeypatch.setenv("GLOWPLUG_SLOST", "4")
    monkeypatch.setenv("GLOWPLUG_CHUNK", "512")
    monkeypatch.setenv("GLOWPLUG_SNAPSHOT_SIZE", "1M")
    settings = found(run("--json"))["settings"]
    assert settings["state"] == "warning"
    assert "GLOWPLUG_SLOST is no setting and changes nothing" in settings["text"]
    assert "GLOWPLUG_CHUNK is no setting any more and changes nothing: a step takes 256" in settings["text"]
    assert settings["text"].count("GLOWPLUG_") == 3


def test_a_redis_that_answers(redis_url: str) -> None:
    finding = doctor._redis(AgentConfig(redis_url=redis_url))
    assert finding.state == "ok", finding
    assert finding.text.startswith("version ")


@pytest.mark.parametrize("url", ["http://127.0.0.1", "nonsense"])
def test_a_url_that_is_none_of_redis(url: str) -> None:
    finding = doctor._redis(AgentConfig(redis_url=url))
    assert (finding.state, "GLOWPLUG_REDIS_URL" in finding.text) == ("failed", True)


def test_credentials_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._s3(AgentConfig(s3_anonymous=True)).state == "ok"
    assert doctor._s3(AgentConfig()).state == "note"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-shown")
    finding = doctor._s3(AgentConfig(s3_endpoint="http://store"))
    assert (finding.state, finding.text) == ("ok", "credentials for http://store come from env")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert doctor._s3(AgentConfig()).state == "failed"


MODEL = ModelStatus("s3://b/m", "src-1", "rev-1", "ready", "dram", 9, 9, 2 << 20, 1, 0.0)


def status(ssd: SsdStatus | None = None, **more: Any) -> StatusReply:
    return StatusReply("node-a", 1, 64, 9, [MODEL], ssd, **more)


def test_the_tiers_of_a_node() -> None:
    off, *_ = doctor._node(status())
    assert (off.state, "--ssd DIR" in off.advice) == ("note", True)
    image = ImageStatus("s3://b/m", "src-1", "rev-1", 9, 0)
    good, tier, orphans = doctor._node(
        status(SsdStatus("/ssd", 100, 9, [image], []), tiers=[TierStatus("ssd", 3, 2e9, 0.1, 1, 1)], orphaned=7)
    )
    assert (good.state, tier.state, orphans.state) == ("ok", "ok", "warning")
    assert "2000 MB/s over 3 loads" in tier.text
    bad, *_ = doctor._node(status(SsdStatus("/ssd", 100, 9, [], [QuarantineStatus("src-2.1", "truncated")])))
    assert (bad.state, "src-2.1: truncated" in bad.text) == ("warning", True)


def test_the_last_start() -> None:
    spans = [Span("worker", "imports", 0, 10**9), Span("worker", "weights", 10**9, 4 * 10**9)]
    spans.append(Span("agent", "transfer", 10**9, 4 * 10**9))
    start = Start("s", "chat", "s3://b/m", "cold", 0.0, spans, "", "origin", 630_000_000)
    last = doctor.last_start(start, False, False)
    assert last is not None
    assert last["sentence"].startswith(
        "transfer from origin took 75% of 4.00 s at 210 MB/s; this node's SSD tier is off"
    )
    assert last["phases"] == {"transfer from origin": 3.0, "worker imports": 1.0}
    assert doctor.last_start(Start("s", "chat", "m", "cold", 0.0, []), False, False) is None


def test_a_function_with_an_agent_of_its_own_tells_its_start(serve: Callable[..., Any]) -> None:
    ledger = Ledger("worker", "start-7")
    ledger.extend([Span("worker", "imports", 0, 3 * 10**9), Span("worker", "attach", 3 * 10**9, 4 * 10**9)])
    served = serve(Application(FunctionConfig(start_timeout=1.0), Lifecycle("m", 4), ledger, lambda reason: None))
    last = json.loads(run("--json", "--url", f"http://127.0.0.1:{served.port}").stdout)["last_start"]
    assert (last["start_id"], last["bottleneck"], last["share"]) == ("start-7", "worker imports", 0.75)
    assert doctor._served(f"http://127.0.0.1:{served.port}/nothing") is None


def test_a_model_that_the_agent_cannot_have(
    agent_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with agent_process() as agent:
        result = run("--socket", str(agent.socket), "--model", str(tmp_path), "--json")
    assert result.exit_code == 1
    assert found(result)["agent"]["state"] == "ok"
    assert found(result)["model"]["state"] == "failed"
