"""The file in which a supervisor publishes its layers for `glowplug layers`, written anew when they change.

    {"pid": …, "mode": "pod" | "pool", "name": …, "rho": …, "layers": [
        {"level": "lang", "model": "", "state": …, "since": …, "seconds": …, "bytes": …, "hold": …,
         "why": …}]}

`model` is the URI of a model that a pool holds or that one of its functions serves, "" in a pod; a pool's `user` layers
also have the `function`'s name. `state` is `building`, `used` (a process that was forked from the layer runs), `idle`
or `absent`. `since` is when the layer became idle, in seconds of CLOCK_MONOTONIC, null while it is used. `hold` is in
seconds of idleness as in `HoldDecision`, null for ever. The supervisor deletes its file; a file that was left behind is
known by its pid. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from cache_agent.client.cache_client import CacheClient
    from runtime.layers.reporter import LayerReporter
    from runtime.layers.rule import LayerRule, Presence

_PREFIX = "glowplug-layers-"
_APART = 1.0  # seconds between two writes: requests come oftener than people look


def entry(level: str, presence: Presence, rule: LayerRule, model: str = "") -> dict[str, Any]:
    """Return one layer for the file, with what its rule decides."""
    decision, since = rule.decision, rule.since
    return {
        "level": level,
        "model": model,
        "state": presence if presence != "there" else "used" if since is None else "idle",
        "since": since,
        "seconds": decision.layer.seconds,
        "bytes": decision.layer.bytes,
        "hold": decision.hold if math.isfinite(decision.hold) else None,
        "why": rule.why,
    }


def directory() -> str:
    """Return the directory of these files."""
    import tempfile  # not while a request waits for the shim that has imported this module

    return tempfile.gettempdir()


class Published:
    """A supervisor's file. A write that fails is left out: no request depends on it."""

    def __init__(
        self,
        mode: str,
        name: str,
        rho: float,
        client: Callable[[], CacheClient] | None = None,
    ) -> None:
        """`client()` speaks to the agent, which is then told of the layers, too."""
        self._head = {"pid": os.getpid(), "mode": mode, "name": name, "rho": rho}
        self._client = client
        self._reporter: LayerReporter | None = None
        self._path = ""
        self._last: Sequence[dict[str, Any]] | None = None
        self._at = -math.inf

    def write(self, layers: Sequence[dict[str, Any]], now: float = math.inf) -> None:
        """Write the layers if they have changed and the last write was a second ago; else a later call does."""
        if layers == self._last or now - self._at < _APART:
            return
        self._last, self._at = layers, now
        self._report(layers)
        self._path = self._path or os.path.join(directory(), f"{_PREFIX}{os.getpid()}.json")
        new = f"{self._path.removesuffix('.json')}.new"
        with contextlib.suppress(OSError):
            # Other users may write to this directory, too, and lay a link there: never write through one.
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with open(fd, "w") as file:
                json.dump({**self._head, "layers": layers}, file)
            os.replace(new, self._path)

    def _report(self, layers: Sequence[dict[str, Any]]) -> None:
        if self._reporter is None and self._client is not None:
            from runtime.layers.reporter import LayerReporter  # starts threads: imported only where needed

            self._reporter = LayerReporter(self._client, self._head)
        if self._reporter is not None:
            self._reporter.report(layers)

    def close(self) -> None:
        if self._reporter is not None:
            self._reporter.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def read(place: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield the files of supervisors that live. Any user may write there: what is no such file is passed over."""
    from pathlib import Path

    for path in sorted((place or Path(directory())).glob(f"{_PREFIX}*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(path.read_text())
            if path.name == f"{_PREFIX}{found['pid']}.json" and os.path.exists(f"/proc/{int(found['pid'])}"):
                yield found
