"""Fan-out: eight agents on this machine load the same model at once, each behind a slow link of its own.

S3 server, Redis and agents are real; the network is simulated. Every node's link carries a fixed number of bytes per
second in each direction, from all sources together. One agent alone takes size ÷ rate. Eight agents, which could all
read the store at their full rate, are compared with that: the bytes read from the store, and the time of the last one.
In the second run two of them, which both send and receive chunks, are killed on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from report import Report
from rich.console import Console
from tiny_model.random_checkpoint import random_checkpoint

from benchmarks import machine, models
from benchmarks.agents import Running, agent
from benchmarks.harness import Sample, Unavailable, Variant, judged, measure, middle, ratio_rows
from benchmarks.links import Links
from benchmarks.stores import Store, store
from cache_agent.client.cache_client import CacheClient

NAME = "fanout"
_NODES = 8
_RATE = 12.5e6  # bytes per second: 100 Mbit/s, slow enough that this machine's processors are not the limit
_LIMIT_SECONDS = 300.0


def run(quick: bool, console: Console) -> Report:
    nodes = 4 if quick else _NODES
    try:
        with _checkpoint(quick, console) as place, store(place) as s3, _redis() as redis:
            bench = _Fanout(s3, redis, models.weight_bytes(place), _RATE * (2 if quick else 1))
            variants = [
                Variant("one agent", lambda: bench.load(1)),
                Variant("all agents", lambda: bench.load(nodes)),
                Variant("all agents, two are killed", lambda: bench.load(nodes, kill=(0, nodes - 2))),
            ]
            machine.warm(models.weight_files(place))
            result = measure(variants, 1 if quick else 3, title=NAME, console=console)
    except Unavailable as error:
        return judged(NAME, {}, [{"variant": "(all)", "reason": str(error)}], [], quick)
    if len(bench.digests) != 1:
        raise RuntimeError(f"the agents ended with different bytes: {bench.digests}")
    pairs = {
        "time_vs_one_agent": result.ratio("all agents", "one agent", "last_ready_s"),
        "time_vs_one_agent_killed": result.ratio("all agents, two are killed", "one agent", "last_ready_s"),
    }
    headline = {
        "origin_egress_copies": result.median("all agents", "egress_copies"),
        **{key: middle(pair) for key, pair in pairs.items()},
        "origin_egress_copies_killed": result.median("all agents, two are killed", "egress_copies"),
    }
    case: dict[str, str | float] = {"agents": nodes, "link_mb_s": bench.rate / 1e6, "pages": "4 KiB"}
    return judged(NAME, headline, [*result.rows(**case), *ratio_rows(pairs, **case)], [result], quick)


@contextlib.contextmanager
def _checkpoint(quick: bool, console: Console) -> Iterator[Path]:
    """Return a model of some 240 MB; in a quick run one of 100 MB, which is not kept."""
    if not quick:
        yield models.checkpoint("125m", console)
        return
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-model-") as place:
        model = Path(place) / "llama-1-layer"
        random_checkpoint(model, arch="llama", size="125m", dtype="bf16", layers=1, seed=0)
        yield model


class _Fanout:
    """Run loads, each on agents of its own; `digests` are those of the bytes that the agents have in the end."""

    def __init__(self, s3: Store, redis: str, size: int, rate: float) -> None:
        self.rate = rate
        self.digests: set[str] = set()
        self._s3, self._redis, self._size = s3, redis, size

    def load(self, count: int, kill: Sequence[int] = ()) -> Sample:
        """Load on all agents at once; kill those in `kill` after one and two thirds of the time of one agent."""
        with Links(self.rate) as links, contextlib.ExitStack() as stack:
            agents = [stack.enter_context(self._agent(links, f"n{number}")) for number in range(count)]
            start = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                futures = [pool.submit(_ready, running.client, self._s3.uri) for running in agents]
                for turn, victim in enumerate(kill):
                    time.sleep(max(0.0, start + (turn + 1) * self._size / self.rate / 3 - time.perf_counter()))
                    agents[victim].process.kill()
                survivors = [future for number, future in enumerate(futures) if number not in kill]
                found = [future.result(_LIMIT_SECONDS) for future in survivors]
            self.digests |= {digest for _, digest in found}
            times = sorted(ready - start for ready, _ in found)
            return {
                "last_ready_s": times[-1],
                "first_ready_s": times[0],
                "egress_copies": links.from_store.total() / self._size,
                "agents_cpu_s_per_gb": sum(_cpu(running) for running in agents) / (self._size / 1e9 * len(found)),
            }

    @contextlib.contextmanager
    def _agent(self, links: Links, node: str) -> Iterator[Running]:
        place = urlsplit(self._s3.endpoint)
        listen = _free_port()
        with tempfile.NamedTemporaryFile(prefix="glowplug-bench-key-") as key:
            key.write(_KEY)
            key.flush()
            options = ["--node", node, "--redis-url", self._redis, "--cluster-key-file", key.name]
            options += ["--agent-listen", f"127.0.0.1:{listen}"]
            options += ["--agent-address", f"127.0.0.1:{links.peer_door(node, listen)}"]
            door = links.origin_door(node, place.hostname or "", place.port or 80)
            options += ["--s3-endpoint", f"http://127.0.0.1:{door}"]
            options += ["--dram", str(self._size * 2), "--huge-pages", "never"]
            with agent(*options, environment={**self._s3.environment, "GLOWPLUG_SSD": ""}) as running:
                yield running


_KEY = secrets.token_hex(32).encode()


def _ready(client: CacheClient, uri: str) -> tuple[float, str]:
    """Wait for the model; return the time at which it was there, and a digest of its bytes."""
    with client.lease(uri, deadline=time.monotonic() + _LIMIT_SECONDS) as lease:
        lease.wait_ready(time.monotonic() + _LIMIT_SECONDS)
        ready = time.perf_counter()
        found = hashlib.sha256()
        for fd, size in zip(lease.segments, lease.manifest.segments, strict=True):
            with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as data:
                found.update(data)
        return ready, found.hexdigest()


def _cpu(running: Running) -> float:
    with contextlib.suppress(OSError, IndexError):  # a killed agent sends nothing more
        return running.cpu_seconds()
    return 0.0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    """Run a Redis server, and yield its URL. Raises `Unavailable` where redis-server is not installed."""
    beside = Path(sys.executable).parent / "redis-server"
    program = str(beside) if beside.exists() else shutil.which("redis-server")
    if program is None:
        raise Unavailable("there is no redis-server: install it")
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-redis-") as place:
        path = Path(place) / "redis.sock"
        command = [
            program,
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            place,
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 30
            while not path.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Unavailable("redis-server did not start")
                time.sleep(0.02)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait()
