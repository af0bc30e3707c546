"""Owns the cache agent that a benchmark measures: a real process on a socket of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache_agent.client import CacheClient
from cache_agent.errors import AgentError

_START_SECONDS = 30.0


@dataclass
class Running:
    client: CacheClient
    socket: Path
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """Processor seconds that the agent has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def agent(*options: str, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """An agent with these `glowplug-agent serve` options; ended with the block."""
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as place:
        path = Path(place) / "agent.sock"
        command = [str(Path(sys.executable).parent / "glowplug-agent"), "serve", "--log-level", "warning"]
        process = subprocess.Popen(
            [*command, "--socket", str(path), *options], env={**os.environ, **(environment or {})}
        )
        client = CacheClient(path, name="bench", timeout=5.0)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while True:
                try:
                    client.status()
                    break
                except AgentError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
            yield Running(client, path, process)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
