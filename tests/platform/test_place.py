"""`glowplug place`: from a file of estimates, and from the agent of this node."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from runtime.cli import main

MODEL = "s3://models/a"
GB = 10**9
NODES = [
    {
        "name": "busy",
        "tiers": [{"name": "dram", "bytes": 4 * GB}],
        "places": 0,
        "running": [{"ends_in": 12.0, "move_seconds": 0.8}],
    },
    {"name": "disk", "tiers": [{"name": "ssd", "bytes": 4 * GB, "bandwidth": 2.5e9}], "queue": 0.5},
    {"name": "full", "places": 0},
    {"name": "plain", "alive": False},
]


@pytest.fixture
def estimates(tmp_path: Path) -> Path:
    path = tmp_path / "estimates.json"
    path.write_text(json.dumps({"models": {MODEL: {"bytes": 4 * GB, "nodes": NODES}}}))
    return path


def place(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(main, ["place", *map(str, arguments)])


def test_says_why(estimates: Path) -> None:
    result = place(MODEL, "--estimates", estimates, "--why")
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.output.splitlines()] == [
        line.split()
        for line in (
            "busy   0.85 s  move  score 10",
            "move what runs there in 0.80 s; all of it is in memory",
            "disk   2.15 s  load  score 7",
            "0.50 s of loading come first, 4000 MB from ssd in 1.60 s",
            "plain  16.05 s  load  score 0",
            "no agent is known there, 4000 MB from origin in 16.00 s (100% of it assumed, not measured)",
            "full  never  none  score 0",
            "no place is free, and nothing is known to end (100% of it assumed, not measured)",
        )
    ]


def test_for_programs(estimates: Path) -> None:
    rows = json.loads(place(MODEL, "--estimates", estimates, "--json").output)
    assert [(row["node"], row["way"], row["seconds"], row["score"]) for row in rows] == [
        ("busy", "move", 0.85, 10),
        ("disk", "load", 2.15, 7),
        ("plain", "load", 16.05, 0),
        ("full", "none", None, 0),
    ]


def test_asks_the_nodes_agent(agent: Any, write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    env = {"GLOWPLUG_SOCKET": str(agent.socket)}
    assert "from origin" in place(folder, "--why", env=env).output
    with agent.client.lease(f"file://{folder}") as lease:
        lease.wait_ready(time.monotonic() + 30)
        assert "all of it is in memory" in place(folder, "--why", env=env).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("s3://models/unknown", "--estimates", "estimates.json"), "no node knows"),
        ((MODEL, "--estimates", "absent.json"), "cannot be read"),
        ((MODEL, "--estimates", "bad.json"), "no estimates"),
        ((MODEL, "--socket", "absent.sock"), "[agent_unreachable]"),
    ],
)
def test_failures_are_sentences(estimates: Path, arguments: tuple[str, ...], said: str) -> None:
    (estimates.parent / "bad.json").write_text("{")
    result = place(*(str(estimates.parent / part) if "." in part and "/" not in part else part for part in arguments))
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output
