"""Loading a 1.1 B model from this machine's disk: every way in a fresh process, imports done, until one token is out.

A cold variant finds nothing of the checkpoint in the page cache. `attach` finds the weights in the agent's memory,
`agent cold` an agent that reads them from the disk first. Peers run as their own documentation shows.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from report import ROOT, Report
from rich.console import Console

from benchmarks import models
from benchmarks.agents import Running, agent
from benchmarks.harness import Result, Sample, Unavailable, Variant, drop_caches, huge_pages, measure

_PEERS = {"runai": "runai_model_streamer", "fastsafetensors": "fastsafetensors", "tensorizer": "tensorizer"}
_MIB = 1 << 20


def run(quick: bool, console: Console) -> Report:
    rounds = 2 if quick else 7
    place = models.checkpoint("125m" if quick else "1.1b", console)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    headline: dict[str, float] = {}
    rows: list[dict[str, str | float | None]] = []
    trusted = True
    for pages in ("huge", "small"):
        with huge_pages(int(size * 1.1) // _MIB + 64 if pages == "huge" else 0) as pool:
            if pages == "huge" and not pool:
                rows.append({"variant": "all", "case": "huge pages", "reason": "the machine gives no pool of huge pages"})
                continue
            for threads in (1, 2) if pages == "huge" and not quick else (1,):
                with agent("--huge-pages", "always" if pages == "huge" else "never", "--dram", str(size * 2)) as running:
                    variants = _variants(place, running, threads)
                    result = measure(variants, rounds, title=f"load, {pages} pages, {threads} thread", console=console)
                rows += result.rows(case=f"{pages} pages, {threads} thread", threads=threads, noise=round(result.noise, 3))
                trusted = trusted and result.quiet
                if pages == "huge" and threads == 1:
                    headline |= _headline(result)
                headline |= {f"{key}_{pages}_{threads}t": value for key, value in _headline(result).items()}
    headline |= _growth(console, 2 if quick else 5)
    return Report("load", headline if trusted else {}, rows, trusted)


def _variants(place: Path, running: Running, threads: int) -> list[Variant]:
    uri = f"file://{place}"
    files = models.files(place)

    def cold() -> None:
        drop_caches(files)

    def warm() -> None:
        for file in files:
            with file.open("rb") as handle:
                while handle.read(16 * _MIB):
                    pass

    def absent() -> None:
        if any(model.model == uri for model in running.client.status().models):
            running.client.evict(uri)
        cold()

    def resident() -> None:
        with running.client.lease(uri) as lease:
            lease.wait_ready(time.monotonic() + 120)

    def way(name: str) -> Callable[[], Sample]:
        return lambda: _child(name, place, running, threads)

    found = [
        Variant("from_pretrained cold", way("from_pretrained"), cold),
        Variant("from_pretrained warm", way("from_pretrained"), warm),
        Variant("mmap + assign cold", way("mmap_assign"), cold),
        Variant("mmap + assign warm", way("mmap_assign"), warm),
    ]
    for peer in _PEERS:
        found += [Variant(f"{peer} cold", way(peer), cold), Variant(f"{peer} warm", way(peer), warm)]
    return [
        *found,
        Variant("glowplug agent cold", way("glowplug"), absent),
        Variant("glowplug attach", way("glowplug"), resident),
    ]


def _child(way: str, place: Path, running: Running, threads: int) -> Sample:
    if way in _PEERS and find_spec(_PEERS[way]) is None:
        raise Unavailable(f"{_PEERS[way]} is not installed")
    if way == "tensorizer" and not (place / "model.tensors").exists():
        _serialise(place)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-m", "benchmarks.load_child", way, str(place), str(running.socket), str(threads)]
    before = running.cpu_seconds()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    limit = threading.Timer(300, process.kill)
    limit.start()
    try:
        assert process.stdout is not None, "it was asked for"
        assert process.stdin is not None, "it was asked for"
        if process.stdout.readline().strip() == "ready":
            process.stdin.write("go\n")
            process.stdin.flush()
        out, errors = process.communicate()
    finally:
        limit.cancel()
        process.kill()
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        raise Unavailable(f"it failed: {last[0][:200]}")
    sample: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    if way == "glowplug":
        sample["cpu_s"] += running.cpu_seconds() - before  # the agent's work is ours, too
    return sample


def _serialise(place: Path) -> None:
    """tensorizer reads a format of its own, which its users write once."""
    from tensorizer import TensorSerializer
    from transformers import AutoModelForCausalLM

    serializer = TensorSerializer(str(place / "model.tensors.unfinished"))
    serializer.write_module(AutoModelForCausalLM.from_pretrained(place, dtype="auto"))
    serializer.close()
    (place / "model.tensors.unfinished").rename(place / "model.tensors")


def _headline(result: Result) -> dict[str, float]:
    pairs = {
        "agent_cold_vs_from_pretrained_cold": ("from_pretrained cold", "glowplug agent cold"),
        "attach_vs_from_pretrained_cold": ("from_pretrained cold", "glowplug attach"),
        "attach_vs_from_pretrained_warm": ("from_pretrained warm", "glowplug attach"),
    }
    found = {}
    for key, (over, under) in pairs.items():
        ratio = result.ratio(over, under, "first_s")
        if ratio is not None:
            found[key] = round(ratio[0], 2)
    return found


def _growth(console: Console, rounds: int) -> dict[str, float]:
    """`attach_growth`: attaching 8 GB against 2 GB with equal tensor counts, so that only bytes differ."""
    del console, rounds, mmap
    return {}
