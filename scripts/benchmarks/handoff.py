"""Hand-off: real functions that end in the middle of their answers; lost tokens and pauses of their clients.

drain       32 streams are read while their replica gets SIGTERM: tokens lost or sent twice, failures, pauses in steps,
            and the time until the replica has released the model. Deterministic mode makes every token comparable.
moved       one stream of a 1000-token prompt is handed over: the longest gap between two of its tokens
recomputed  the same without hand-off: the replica is stopped, and the client asks another one to continue the text
grace       streams that last four times as long as their replica's grace: read to their end by a client that resumes
checkpoint  CPU seconds per token of a function that keeps its requests, over one that does not; the agent's included
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import ROOT, Report, Row
from rich.console import Console

from benchmarks import models
from benchmarks.agents import Running, agent
from benchmarks.harness import Result, Sample, Variant, judged, measure, middle, ratio_rows, row
from benchmarks.traffic import clients, dice, request

NAME = "handoff"

_STREAMS, _PROMPT, _NEW = 32, 64, 160
_LONG_PROMPT = 1000
_BEFORE = 12  # pieces that every stream has when its replica gets SIGTERM
_SECONDS = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")

Body = Mapping[str, Any]


@dataclass
class Replica:
    """One `glowplug serve`, in a session of its own."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                connection.request("GET", "/_/ready")
                if connection.getresponse().status == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("a replica did not become ready; its log is above")
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """Return the processor seconds of all processes of its session."""
        total = 0
        for place in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = place.read_text().rpartition(") ")[2].split()
                if int(fields[3]) == self.process.pid:
                    total += int(fields[11]) + int(fields[12])
        return total / _TICKS

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def replicas(place: Path, running: Running, count: int, **settings: object) -> Iterator[list[Replica]]:
    """Run replicas of one function, ready when the block begins; killed at its end."""
    made: list[Replica] = []
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as folder:
        try:
            for _ in range(count):
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                environment = {
                    **os.environ,
                    "GLOWPLUG_MODEL": f"file://{place}",
                    "GLOWPLUG_SOCKET": str(running.socket),
                    "GLOWPLUG_PORT": str(port),
                    "GLOWPLUG_HOST": "127.0.0.1",
                    "GLOWPLUG_LOG_LEVEL": "warning",
                    "GLOWPLUG_HANDLER": "",
                    "GLOWPLUG_LAYERS": "off",
                    "GLOWPLUG_THREADS": "1",  # each replica has a processor, as it would have on machines of their own
                    "HF_HUB_OFFLINE": "1",
                    **{f"GLOWPLUG_{name.upper()}": str(value) for name, value in settings.items()},
                }
                command = [sys.executable, "-m", "runtime.shim"]
                made.append(
                    Replica(subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True), port)
                )
            for replica in made:
                replica.until_ready()
            yield made
        finally:
            for replica in made:
                replica.kill()


@contextlib.contextmanager
def reading(urls: Sequence[str], bodies: Sequence[Body], *, resume: bool = False) -> Iterator[Callable[[], Any]]:
    """Run all streams during the block; the result is what `handoff_clients` prints at their end."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"urls": list(urls), "bodies": list(bodies), "after": _BEFORE, "resume": resume}, file)
        file.flush()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
        command = [sys.executable, "-m", "benchmarks.handoff_clients", file.name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        out = process.stdout
        try:
            if out.readline().strip() != "running":
                raise RuntimeError("the clients broke; their log is above")
            yield lambda: json.loads(out.readline())
        finally:
            process.kill()
            process.wait()
            out.close()


def run(quick: bool, console: Console) -> Report:
    place = models.checkpoint("125m", console, shards=1)
    rows: list[Row] = []
    headline: dict[str, float | None] = {}
    with agent("--dram", "1G", "--file-root", str(place)) as running:
        running.hold(f"file://{place}")
        console.print(f"[dim]{_STREAMS} streams whose replica drains[/]")
        headline |= _drain(place, running, 32 if quick else _NEW, rows)
        paused = _pauses(place, running, 1 if quick else 5, console)
        ratio = paused.ratio("recomputed", "moved", "pause_ms")
        headline["pause_vs_stop_and_recompute"] = middle(ratio)
        rows += paused.rows(case="pause", prompt=_LONG_PROMPT)
        rows += ratio_rows({"pause_vs_stop_and_recompute": ratio}, case="pause")
        console.print("[dim]streams that last longer than their replica's grace[/]")
        headline |= _grace(place, running, _SECONDS / (10 if quick else 1), rows)
        cost = _checkpoint_cost(place, running, 2 if quick else 9, console)
        pair = cost.ratio("kept", "not kept", "cpu_ms_per_token")
        headline["checkpoint_cost"] = middle(pair)
        rows += cost.rows(case="checkpoint", prompt=_PROMPT)
        rows += ratio_rows({"checkpoint_cost": pair}, case="checkpoint")
    return judged(NAME, headline, rows, [paused, cost], quick)


# --- 32 streams -------------------------------------------------------------------------------------------------------


def _drain(place: Path, running: Running, new: int, rows: list[Row]) -> dict[str, float | None]:
    chance = dice(0)
    bodies = [
        {**request(0.0, _PROMPT, new, chance)["body"], "temperature": 1.0, "seed": number} for number in range(_STREAMS)
    ]
    settings = {"checkpoints": "bench", "deterministic": 1, "slots": _STREAMS, "decode_rows": _STREAMS}
    with replicas(place, running, 2, **settings) as (source, destination):
        with reading([destination.url], bodies) as result:
            wanted = result()
        with reading([source.url], bodies) as result:
            told = time.monotonic()
            source.end()
            freed = _freed(running, told)
            found = result()
    lost = sum(abs(new - one["tokens"]) + (one["text"] != two["text"]) for one, two in zip(found, wanted, strict=True))
    failed = sum(bool(one["error"]) for one in found)
    steps, pauses = [], []
    for one in found:
        before = _gaps([moment for moment in one["times"] if moment < told])
        after = _gaps([moment for moment in one["times"] if moment >= told - 1.0])
        if before and after:
            steps.append(statistics.median(before) * 1e3)
            pauses.append(max(after) / statistics.median(before))
    handed = [item for item in running.client.status().handoffs if item.outcome == "moved"]
    constant: dict[str, str | float] = {
        "case": "drain",
        "variant": "moved",
        "streams": float(_STREAMS),
        "prompt": float(_PROMPT),
    }
    rows.append({**constant, **row(steps, metric="step_ms")})
    rows.append({**constant, **row(pauses, metric="pause_steps")})
    if handed:
        rows.append({**constant, **row([item.pause * 1e3 for item in handed], metric="standstill_ms")})
    return {
        "lost_or_duplicated_tokens": float(lost),
        "failed_requests": float(failed),
        "moved_streams": float(len(handed)),
        "pause_p95_steps": _percentile(pauses, 0.95),
        "source_freed_ms": freed,
    }


def _freed(running: Running, told: float) -> float | None:
    """Return the milliseconds until the agent counts one holder of the model less."""
    deadline = told + 60
    while time.monotonic() < deadline:
        if sum(model.leases for model in running.client.status().models) <= 1:
            return (time.monotonic() - told) * 1e3
        time.sleep(0.005)
    return None


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def _percentile(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else None


# --- one long prompt --------------------------------------------------------------------------------------------------


def _pauses(place: Path, running: Running, rounds: int, console: Console) -> Result:
    seeds = iter(range(1000))

    def body() -> dict[str, Any]:
        return dict(request(0.0, _LONG_PROMPT, 60, dice(next(seeds)))["body"])

    def moved() -> Sample:
        settings = {"handoff": "bench", "prefix_cache": 0}
        with replicas(place, running, 2, **settings) as (source, _), reading([source.url], [body()]) as result:
            told = time.monotonic()
            source.end()
            (one,) = result()
        return {"pause_ms": max(_gaps([moment for moment in one["times"] if moment >= told - 1.0])) * 1e3}

    def recomputed() -> Sample:
        wanted = body()
        with replicas(place, running, 2, prefix_cache=0) as (source, other):
            with reading([source.url], [wanted]) as result:
                source.kill()
                (one,) = result()
            # The client does not know the ids of the text so far; as many other ids take as long.
            again = {**wanted, "prompt": [*wanted["prompt"], *wanted["prompt"][: len(one["times"])]], "max_tokens": 4}
            with reading([other.url], [again]) as result:
                (rest,) = result()
        return {"pause_ms": (rest["times"][0] - one["times"][-1]) * 1e3}

    variants = [Variant("moved", moved), Variant("recomputed", recomputed)]
    return measure(variants, rounds, title=f"{NAME}, pause", console=console)


# --- longer than the grace --------------------------------------------------------------------------------------------


def _grace(place: Path, running: Running, seconds: float, rows: list[Row]) -> dict[str, float | None]:
    """End every replica a quarter of the streams' time after its start; there is always a next replica."""
    grace = seconds / 4
    settings = {"checkpoints": "bench", "drain_grace": grace, "answer_limit": 10 * seconds}
    with replicas(place, running, 2, **settings) as (source, destination):
        chance = dice(1)
        probe = clients(destination.port, [request(0.0, _PROMPT, 64, chance) for _ in range(4)])
        rate = statistics.median((one["tokens"] - 1) / (one["total_s"] - one["first_s"]) for one in probe)
        bodies = [request(0.0, _PROMPT, min(1900, round(rate * seconds)), chance)["body"] for _ in range(4)]
        with reading([source.url, destination.url], bodies, resume=True) as result:
            begun = time.monotonic()
            source.end()
            source.process.wait(2 * grace + 60)
            ended = time.monotonic() - begun
            found = result()
    complete = [one for one in found if not one["error"] and one["tokens"] == bodies[0]["max_tokens"]]
    lasted = [one["times"][-1] - one["times"][0] for one in found]
    constant: dict[str, str | float] = {
        "case": "grace",
        "variant": "resumed",
        "grace_s": grace,
    }
    rows.append({**constant, **row(lasted, metric="stream_s")})
    rows.append({**constant, **row([ended], metric="source_ended_s")})
    return {"outlived_grace": len(complete) / len(found)}


# --- what keeping costs -----------------------------------------------------------------------------------------------


def _checkpoint_cost(place: Path, running: Running, rounds: int, console: Console) -> Result:
    chance = dice(2)
    with contextlib.ExitStack() as stack:
        (kept,) = stack.enter_context(replicas(place, running, 1, checkpoints="bench", prefix_cache=0))
        (plain,) = stack.enter_context(replicas(place, running, 1, prefix_cache=0))

        def tokens(tested: Replica) -> Callable[[], Sample]:
            def once() -> Sample:
                before = tested.cpu_seconds() + running.cpu_seconds()
                found = clients(tested.port, [request(0.0, _PROMPT, 64, chance) for _ in range(8)])
                used = tested.cpu_seconds() + running.cpu_seconds() - before
                return {"cpu_ms_per_token": used / sum(one["tokens"] for one in found) * 1e3}

            return once

        for tested in (kept, plain):
            tokens(tested)()
        variants = [Variant("kept", tokens(kept)), Variant("not kept", tokens(plain))]
        return measure(variants, rounds, title=f"{NAME}, checkpoints", console=console)
