"""scripts/demo: what a newcomer sees first, and the format of every benchmark's result file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(240)
def test_the_demo_answers_and_shares_one_copy(tmp_path: Path) -> None:
    result = tmp_path / "demo.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "--json", result],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Copies of the weights on this machine: 1" in done.stdout
    assert "Glowplug makes LLM functions" in done.stdout.replace("\n", " ")
    report = json.loads(result.read_text())
    assert set(report) == {"name", "commit", "machine", "trusted", "note", "headline", "rows"}
    assert report["name"] == "demo"
    assert report["headline"]["copies_of_weights"] == 1
    assert {"processor", "cpus", "kernel", "torch", "load_average"} <= set(report["machine"])
    spans = {(row["start"], row["owner"], row["span"]) for row in report["rows"]}
    # From the shim's first instruction to the first token; only the first start moves bytes.
    assert {("first", "shim", "python"), ("first", "agent", "transfer"), ("first", "worker", "first token")} <= spans
    assert ("second", "agent", "transfer") not in spans


def test_the_demo_says_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "--model", tmp_path / "nothing"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode != 0
    assert "there is no such directory" in done.stdout + done.stderr
