"""Clients that read streams while a replica drains: a process of its own, a thread per stream.

    python -m benchmarks.handoff_clients JOB.json

The job: {"urls": […], "bodies": […], "after": N, "resume": bool}. Prints `running` once every stream has N pieces, then
a list of {"times": when each piece came (CLOCK_MONOTONIC), "text", "tokens", "error"}. With `resume` the rest of a
stream that breaks off is asked for at the next URL; without, the stream is over.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.resume.client import AskFailed, ask

_PATH = "/v1/completions"


class Reader:
    """One stream, and what it received."""

    def __init__(self, job: dict[str, Any], body: dict[str, Any]) -> None:
        self.enough = threading.Event()
        self.result: dict[str, Any] = {"times": [], "text": "", "tokens": 0, "error": ""}
        self._job, self._body = job, {**body, "stream": True, "stream_options": {"include_usage": True}}

    def run(self) -> None:
        try:
            for frame in self._frames():
                if (usage := frame.get("usage")) is not None:
                    self.result["tokens"] = usage["completion_tokens"]
                if text := "".join(choice["text"] for choice in frame["choices"]):
                    self.result["times"].append(time.monotonic())
                    self.result["text"] += text
                    if len(self.result["times"]) >= self._job["after"]:
                        self.enough.set()
        except (OSError, AskFailed) as error:
            self.result["error"] = str(error) or type(error).__name__
        finally:
            self.enough.set()

    def _frames(self) -> Iterator[dict[str, Any]]:
        """Yield the stream's events; without `resume`, the first failure is the end."""
        urls, patience = self._job["urls"], 60.0 if self._job["resume"] else 0.0
        for event in ask(urls, _PATH, self._body, patience=patience, silence=60.0):
            yield json.loads(event.data)


def main(file: str) -> None:
    job = json.loads(Path(file).read_text())
    readers = [Reader(job, body) for body in job["bodies"]]
    threads = [threading.Thread(target=reader.run) for reader in readers]
    for thread in threads:
        thread.start()
    for reader in readers:
        reader.enough.wait()
    print("running", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps([reader.result for reader in readers]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
