"""`glowplug place` and the extender: from a directory that agents share, a file of estimates, this node's agent."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
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


@pytest.fixture
def cluster(
    redis_roles: Callable[[str], tuple[str, Path]],
    start_agent: Callable[..., Any],
    write_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> Iterator[SimpleNamespace]:
    """Two agents that tell a real Redis what they have, with the rights of the manifests; one has `uri` in memory."""
    url, password = redis_roles("agent")
    tell = {"GLOWPLUG_REDIS_URL": url, "GLOWPLUG_REDIS_PASSWORD_FILE": str(password)}
    first, second = (start_agent(env={**tell, "GLOWPLUG_NODE": name}) for name in ("node-1", "node-2"))
    uri = f"file://{write_checkpoint(tmp_path / 'model')}"
    reading, secret = redis_roles("placer")
    placer = {"GLOWPLUG_REDIS_URL": reading, "GLOWPLUG_REDIS_PASSWORD_FILE": str(secret)}
    with first.client.lease(uri) as lease:
        lease.wait_ready(time.monotonic() + 30)
        yield SimpleNamespace(uri=uri, first=first, second=second, placer=placer)


@contextlib.contextmanager
def extender(env: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """As in warm-scheduler's pod: a program of its own, with the right to read and no more. `ask(verb, **annotations)`:

    what it says of three nodes, or None while it does not listen.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from runtime.cli import main; main()",
        "agent",
        "extender",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)

    def ask(verb: str, **annotations: str) -> Any:
        given = {f"glowplug.dev/{name.replace('_', '-')}": text for name, text in annotations.items()}
        body = {"Pod": {"metadata": {"annotations": given}}, "NodeNames": ["node-1", "node-2", "node-3"]}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            try:
                connection.request("POST", f"/scheduler/{verb}", json.dumps(body))
            except ConnectionRefusedError:
                return None
            return json.loads(connection.getresponse().read())

    try:
        yield ask
    finally:
        process.terminate()
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert "without knowledge" not in said


def test_command_and_extender_go_by_what_the_nodes_tell(
    cluster: SimpleNamespace, eventually: Callable[..., Any]
) -> None:
    def found() -> list[str]:
        done = place(cluster.uri, "--why", env=cluster.placer)
        return (
            [line.split()[0] for line in done.output.splitlines()[::2]]
            if "all of it is in memory" in done.output
            else []
        )

    def allowed() -> list[str]:
        return list(answer["NodeNames"]) if (answer := ask("filter", require_agent="true")) else []

    with extender(cluster.placer) as ask:
        eventually(lambda: found() == ["node-1", "node-2"], what="both are known")
        rows = json.loads(place(cluster.uri, "--json", env=cluster.placer).output)
        assert [(row["node"], row["way"]) for row in rows] == [("node-1", "load"), ("node-2", "load")]
        assert rows[0]["seconds"] < rows[1]["seconds"]
        options = ("--redis-url", cluster.placer["GLOWPLUG_REDIS_URL"])
        options += ("--redis-password-file", cluster.placer["GLOWPLUG_REDIS_PASSWORD_FILE"])
        assert place(cluster.uri, *options).output == place(cluster.uri, env=cluster.placer).output
        assert "no node knows" in place("s3://models/unknown", env=cluster.placer).output
        eventually(lambda: allowed() == ["node-1", "node-2"], 30, "the extender knows them, too")
        assert [row["Score"] for row in ask("prioritize", model="s3://models/unknown")] == [0, 0, 0]
        cluster.second.stop()
        eventually(lambda: found() == ["node-1"], what="who has gone is gone")
        eventually(lambda: allowed() == ["node-1"], 30, "for the extender, too")


def test_a_directory_that_is_gone_is_a_sentence() -> None:
    begun = time.monotonic()
    result = place(MODEL, "--redis-url", "redis://127.0.0.1:1")
    assert (result.exit_code, "the directory at redis://127.0.0.1:1 cannot be used" in result.output) == (1, True)
    assert time.monotonic() - begun < 20
    bad = place(MODEL, "--redis-url", "http://r")
    assert (bad.exit_code, "[bad_config]" in bad.output, "Traceback" in bad.output) == (64, True, False)


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
