"""`scripts/simulate placement`: what must hold in any run, and the result file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def simulation() -> Iterator[Any]:
    """Its modules; they lie beside the launcher, not in a package."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        from simulations import cluster, placement, trace

        yield SimpleNamespace(cluster=cluster, placement=placement, trace=trace)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("speed", [0.5, 4.0])
def test_every_request_is_served_once_and_never_too_soon(simulation: Any, speed: float) -> None:
    requests = simulation.trace.synthetic(600, hours=0.1)
    sizes, assigned = simulation.placement.workload(requests, seed=3)
    hardware = simulation.cluster.Hardware(nodes=6)
    for name, policy in simulation.placement.POLICIES.items():
        cluster = simulation.cluster.Cluster(sizes, policy, hardware, seed=3)
        cluster.run(assigned, speed)
        assert len(cluster.done) == len(requests), name
        for running in cluster.done:
            assert running.tier in ("warm", "dram", "ssd", "origin"), (name, "somebody still waits")
            least = {"ssd": hardware.ssd_rate, "origin": hardware.origin_rate, "dram": hardware.dram_rate}
            assert running.start >= (sizes[running.model] / least[running.tier] if running.tier in least else 0.0)
            assert running.ends >= running.arrival + running.start + running.service - 1e-6
        for node in cluster.nodes:
            assert len(node.instances) <= node.places
            assert sum(node.dram.values()) <= hardware.dram
            assert sum(node.ssd.values()) <= hardware.ssd
            assert not node.waiting
            assert node.open == node.places


def test_a_seed_gives_the_same_run(simulation: Any) -> None:
    requests = simulation.trace.synthetic(300, hours=0.05)
    assert requests == simulation.trace.synthetic(300, hours=0.05)
    first = simulation.placement.compare(requests, seeds=2, speed=1.0)
    assert first == simulation.placement.compare(requests, seeds=2, speed=1.0)
    assert first[0]["mean"] != first[5]["mean"], "seeds differ"


def test_reads_azures_trace(simulation: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += ["2023-11-16 18:17:04.0319600,3180,8", "2023-11-16 18:17:03.9799600,4808,10"]
    path.write_text("\r\n".join(rows) + "\r\n")
    (first, second), source = simulation.trace.load(path)
    assert (first, source) == ((0.0, 4808, 10), "trace.csv")
    assert second.arrival == pytest.approx(0.052)


def test_command(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != "GLOWPLUG_TEST_DATA"}
    environment["PYTHONPATH"] = str(SCRIPTS.parent)
    command = [sys.executable, str(SCRIPTS / "simulate.py"), "placement", "--quick", "--json", str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "synthetic" in done.stdout
    report = json.loads(result.read_text())
    assert report["name"] == "placement"
    assert {row["policy"] for row in report["rows"]} == {
        "random",
        "least-loaded",
        "image-locality",
        "serverless-llm",
        "glowplug",
    }
    means = {name.removesuffix(" mean"): value for name, value in report["headline"].items() if name.endswith(" mean")}
    assert max(means["glowplug"], means["serverless-llm"]) < means["image-locality"] < means["random"]
