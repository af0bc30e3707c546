"""The cache agent that a benchmark measures: a real process on a socket of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import AgentError

_START_SECONDS = 30.0
_LOAD_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Running:
    client: CacheClient
    socket: Path
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """Return the processor seconds that the agent has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def hold(self, uri: str) -> None:
        """Load the model into memory, and wait until its identity is computed and the agent idle."""
        with self.client.lease(uri) as lease:
            lease.wait_ready(time.monotonic() + _LOAD_SECONDS)
        self.settle()

    def settle(self) -> None:
        """Wait until the agent has hashed what it loaded: that work would disturb the next variant."""
        deadline = time.monotonic() + _LOAD_SECONDS
        while any(not model.revision for model in self.client.status().models):
            if time.monotonic() > deadline:
                raise TimeoutError("the agent did not finish hashing")
            time.sleep(0.05)

    def store(self, uri: str) -> None:
        """Write the model's whole image to SSD; the agent needs `--ssd`."""
        deadline = time.monotonic() + _LOAD_SECONDS
        if not self._stored(uri):
            self.hold(uri)
        while not self._stored(uri):
            if time.monotonic() > deadline:
                raise TimeoutError("the agent did not write the image")
            time.sleep(0.05)
        self.settle()

    def _stored(self, uri: str) -> bool:
        ssd = self.client.status().ssd
        return ssd is not None and any(image.model == uri for image in ssd.images)

    def forget(self, uri: str, *, ssd: bool = False) -> None:
        """Evict the model if it is there, and its image with `ssd`.

        A holder whose process has just ended may still be counted for a moment.
        """
        deadline = time.monotonic() + _START_SECONDS
        while any(model.model == uri for model in self.client.status().models) or (ssd and self._stored(uri)):
            try:
                self.client.evict(uri, ssd=ssd)
            except AgentError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@contextmanager
def agent(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run an agent with these `glowplug agent serve` options, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as place:
        path = Path(place) / "agent.sock"
        command = [str(Path(sys.executable).parent / "glowplug"), "agent", "serve", "--log-level", "warning"]
        process = subprocess.Popen(
            [*command, "--socket", str(path), *options], env={**os.environ, **(environment or {})}
        )
        client = CacheClient(path, name="bench", timeout=30.0)
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
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
