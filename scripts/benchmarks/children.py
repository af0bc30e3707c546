"""The parent of `child.py`: runs one load in a fresh process that has done its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec

from report import ROOT

from benchmarks.harness import Sample, Unavailable

LIMIT_SECONDS = 300.0
PEERS = {"runai": "runai_model_streamer", "fastsafetensors": "fastsafetensors", "tensorizer": "tensorizer"}


def run(way: str, job: Mapping[str, str], *, threads: int = 1, environment: Mapping[str, str] | None = None) -> Sample:
    """Return what `child.WAYS[way](job)` measured. Raises `Unavailable` with the last line of the child's error."""
    needs = PEERS.get(way.partition("_")[0])
    if needs and find_spec(needs) is None:
        raise Unavailable(f"{needs} is not installed here")
    command = [sys.executable, "-m", "benchmarks.child", way, json.dumps({**job, "threads": threads})]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT / "scripts",
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **(environment or {})},
    )
    limit = threading.Timer(LIMIT_SECONDS, process.kill)
    limit.start()
    assert process.stdin is not None, "it was asked for"
    assert process.stdout is not None, "it was asked for"
    try:
        go = "go\n" if process.stdout.readline() == "ready\n" else ""
        output, errors = process.communicate(go)
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or [f"it ended with {process.returncode}"]
        raise Unavailable(f"it failed: {last[0][:300]}")
    sample: Sample = json.loads(output.strip().splitlines()[-1])
    return sample
