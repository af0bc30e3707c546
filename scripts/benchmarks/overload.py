"""Overload of a real `glowplug serve`: a herd, a flood, a trace of traffic.

herd    50 clients at once on a function whose worker does not exist yet: none may be refused, one load may happen
flood   ten times the sustainable rate: only 200 and 429, admitted requests are served in bounded time, memory is flat
trace   the Azure LLM trace, scaled to the machine, bursts and all: time to the first token, time per token, refusals
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from report import Report, Row
from rich.console import Console

from benchmarks import machine, models
from benchmarks.agents import agent
from benchmarks.harness import Result as Probes
from benchmarks.harness import judged
from benchmarks.traffic import Result, azure, clients, dice, percentiles, request, steady

NAME = "overload"

_HERD = 50
_PROMPT, _NEW = 64, 32
_BUSY = 429
_LOAD = 0.6  # share of the measured tokens per second that the trace asks for
_SCALE = 0.1  # of the trace's lengths: its prompts have 2000 tokens, this machine two processors


@dataclass
class Function:
    """A running `glowplug serve` on `port`; `memory` holds (time, bytes) of all its processes."""

    port: int
    process: subprocess.Popen[bytes]
    memory: list[tuple[float, int]] = field(default_factory=list)

    def get(self, path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            found: dict[str, object] = json.load(answer)
        return found

    def until_ready(self, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                self.get("/_/ready")  # a 503 is an OSError, too
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the function did not become ready; its log is above")
            time.sleep(0.05)

    def resident(self) -> int:
        """Return the bytes of the session's processes, without shared weights."""
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                if os.getsid(int(status.parent.name)) == self.process.pid:
                    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
                    total += int(lines["RssAnon"].split()[0]) * 1024
        return total

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                self.memory.append((time.monotonic(), self.resident()))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def function(place: Path, agent_socket: Path) -> Iterator[Function]:
    """Run a function for the block; its port is open at the beginning, and its worker not there yet."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as folder:
        environment = {
            **os.environ,
            "GLOWPLUG_MODEL": f"file://{place}",
            "GLOWPLUG_SOCKET": str(agent_socket),
            "GLOWPLUG_PORT": str(port),
            "GLOWPLUG_HOST": "127.0.0.1",
            "GLOWPLUG_QUEUE": str(_HERD),
            "GLOWPLUG_LOG_LEVEL": "warning",
            "GLOWPLUG_HANDLER": "",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("OMP_NUM_THREADS", None)  # the function decides by its processors
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.shim"], env=environment, cwd=folder, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the function did not open its port; its log is above")
                time.sleep(0.005)
            yield Function(port, process)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run(quick: bool, console: Console) -> Report:
    place = models.checkpoint("125m", console, shards=1)
    rows: list[Row] = []
    headline: dict[str, float | None] = {}
    probes = Probes()
    with agent("--dram", "1G", "--file-root", str(place)) as running, function(place, running.socket) as tested:
        probes.probes.append(machine.probe())
        console.print(f"[dim]{_HERD} clients on a function without a worker[/]")
        chance = dice(0)
        herd = clients(tested.port, [request(0.0, _PROMPT, 8, chance) for _ in range(_HERD)])
        headline |= _herd(herd, tested)
        rows += _times("herd", herd)

        console.print("[dim]the rate that it sustains[/]")
        probes.probes.append(machine.probe())
        seconds = 8.0 if quick else 30.0
        rate, tokens_s = _sustained(tested, seconds)
        headline |= {"sustained_requests_s": round(rate, 2), "sustained_tokens_s": round(tokens_s, 1)}

        console.print(f"[dim]ten times {rate:.1f} requests/s[/]")
        probes.probes.append(machine.probe())
        with tested.watched():
            flood = clients(tested.port, steady(10 * rate, 10.0 if quick else 60.0, _PROMPT, _NEW, 2))
        headline |= _flood(flood, tested)
        rows += _times("flood", flood)

        trace = azure(20.0 if quick else 240.0, _LOAD * tokens_s, 2048, _SCALE, 3)
        if trace is None:
            rows.append(
                {"variant": "trace", "metric": None, "reason": "GLOWPLUG_TEST_DATA does not have the Azure trace"}
            )
        else:
            console.print(f"[dim]{len(trace)} requests of the Azure trace[/]")
            probes.probes.append(machine.probe())
            replayed = clients(tested.port, trace)
            headline["trace_requests"] = float(len(replayed))
            headline["trace_refused"] = float(sum(one["status"] == _BUSY for one in replayed))
            headline["trace_errors"] = float(sum(one["status"] not in (200, _BUSY) for one in replayed))
            rows += _times("trace", replayed)
            for row in rows:
                if row["variant"] == "trace" and row["metric"] in ("first_ms", "per_token_ms"):
                    headline |= {f"trace_{row['metric']}_{p}": float(row[p] or 0) for p in ("p50", "p95", "p99")}
        probes.probes.append(machine.probe())
    return judged(NAME, headline, rows, [probes], quick)


def _herd(results: list[Result], tested: Function) -> dict[str, float]:
    spans = tested.get("/_/ledger")["spans"]
    assert isinstance(spans, list), "the ledger is a list of spans"
    loads = sum(span["owner"] == "agent" and span["name"] == "transfer" for span in spans)
    return {
        "errors": float(sum(one["status"] != 200 for one in results)),
        "loads": float(loads),
        "herd_last_s": round(max(one["total_s"] for one in results), 2),
    }


def _sustained(tested: Function, seconds: float) -> tuple[float, float]:
    """Return the requests per second, and their tokens, that the function completes while some always wait."""
    tested.until_ready()
    deadline, done, begun = time.monotonic() + seconds, 0, time.monotonic()
    seed = 100
    while time.monotonic() < deadline:
        chance = dice(seed)
        seed += 1
        results = clients(tested.port, [request(0.0, _PROMPT, _NEW, chance) for _ in range(32)])
        done += sum(one["status"] == 200 for one in results)
    rate = done / (time.monotonic() - begun)
    return rate, rate * (_PROMPT + _NEW)


def _flood(results: list[Result], tested: Function) -> dict[str, float]:
    accepted = [one["total_s"] for one in results if one["status"] == 200]
    sizes = [size for _, size in tested.memory]
    half = len(sizes) // 2
    return {
        "flood_requests": float(len(results)),
        "flood_accepted": float(len(accepted)),
        "flood_odd_statuses": float(sum(one["status"] not in (200, _BUSY) for one in results)),
        "flood_latency_p99_s": round(percentiles(accepted)["p99"], 2),
        # The first half fills slots and kept rows; after it nothing may grow.
        "flood_memory_growth": round(max(sizes[half:]) / max(sizes[:half]), 3) if half else 1.0,
    }


def _times(variant: str, results: list[Result]) -> list[Row]:
    good = [one for one in results if one["status"] == 200]
    metrics = {
        "first_ms": [one["first_s"] * 1e3 for one in good],
        "per_token_ms": [
            (one["total_s"] - one["first_s"]) / (one["tokens"] - 1) * 1e3 for one in good if one["tokens"] > 1
        ],
        "total_ms": [one["total_s"] * 1e3 for one in good],
    }
    rows: list[Row] = []
    for metric, values in metrics.items():
        if values:
            found = {name: round(value, 1) for name, value in percentiles(values).items()}
            middle = sorted(values)
            quartiles = {"median": found["p50"], "q1": round(middle[len(middle) // 4], 1)}
            quartiles["q3"] = round(middle[3 * len(middle) // 4], 1)
            rows.append({"variant": variant, "metric": metric, **quartiles, **found, "runs": len(values)})
    return rows
