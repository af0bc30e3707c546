"""The benchmark of many nodes, as a smoke test: its figures mean nothing here, but all must end with equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
def test_agents_behind_slow_links_end_with_equal_bytes_though_two_are_killed(tmp_path: Path) -> None:
    """The benchmark itself ends with an error where digests differ."""
    result = tmp_path / "fanout.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "fanout", "--quick", "--json", str(result)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    headline = json.loads(result.read_text())["headline"]
    assert 0.9 < headline["origin_egress_copies"] < 2.5, "four nodes that do not help each other would read four"
    assert headline["time_vs_one_agent"] > 0.5
