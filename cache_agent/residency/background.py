"""Owns the threads in which a node's work waits for origins, so that a hanging origin delays its own work only.

An origin that accepts and never answers blocks a thread until the request's deadline has passed. Each origin (an
endpoint, a tree of files) therefore has threads of its own, and each place in it that may fail alone (a bucket, a
directory) can use only some of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cache_agent.model.uri import ModelURI

log = logging.getLogger("glowplug.agent")

_REMOTE = ("s3", "hf")


class Lane(NamedTuple):
    """Work that waits for one `place` in one `origin`: an origin fails as a whole, a place may fail alone."""

    origin: str
    place: str = ""


HERE = Lane("here")  # for work that asks no origin


def here(lane: Lane) -> Lane:
    """Return the lane for work that asks its origin only where this node's own copy is damaged."""
    return Lane(HERE.origin, lane.origin)


def lane_of(uri: ModelURI, roots: Sequence[Path]) -> Lane:
    """Return the lane of a model; the number of origins is bounded, whatever URIs clients ask for. No I/O."""
    if uri.scheme in _REMOTE:
        return Lane(uri.scheme, uri.place.strip("/").partition("/")[0])
    if uri.scheme != "file":
        return Lane("unknown", uri.scheme)
    path = Path(os.path.normpath(uri.place))
    above = [root for root in roots if path.is_relative_to(root)]
    if not above:
        return Lane("file")
    root = max(above, key=lambda root: len(root.parts))
    return Lane(f"file {root}", "".join(path.relative_to(root).parts[:1]))


class _Job(NamedTuple):
    work: Callable[..., None]
    arguments: tuple[object, ...]


class Background:
    """A pool of threads for each origin. Any thread; nothing blocks."""

    def __init__(self, name: str, *, of_origin: int, of_place: int) -> None:
        """At most `of_origin` jobs of an origin run at once, and `of_place` of a place; others wait in a queue."""
        self._name, self._of_origin, self._of_place = name, of_origin, of_place
        self._lock = threading.Lock()  # guards what follows
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._running: Counter[Lane] = Counter()  # jobs that run or are in their pool's queue
        self._waiting: dict[Lane, deque[_Job]] = {}
        self._closed = False

    def submit(self, lane: Lane, work: Callable[..., None], *arguments: object) -> None:
        """Run `work` when its lane has room; an exception of `work` is logged. Raises `RuntimeError` after `close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the agent is being closed")
            if self._running[lane] < self._of_place:
                self._running[lane] += 1
                self._start(lane, _Job(work, arguments))
            else:
                self._waiting.setdefault(lane, deque()).append(_Job(work, arguments))

    def close(self) -> None:
        """Begin no further job, and do not wait for those that run."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            for pool in self._pools.values():
                pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, lane: Lane, job: _Job) -> None:
        """Give a job to its origin's pool. Under the lock."""
        pool = self._pools.get(lane.origin)
        if pool is None:
            pool = self._pools[lane.origin] = ThreadPoolExecutor(self._of_origin, thread_name_prefix=self._name)
        try:
            pool.submit(self._run, lane, job)
        except RuntimeError:  # no thread could be started; the job is queued all the same, for the pool's other threads
            log.exception("a job has to wait")

    def _run(self, lane: Lane, job: _Job) -> None:
        try:
            job.work(*job.arguments)
        except Exception:
            log.exception("%r failed", job.work)
        with self._lock:
            waiting = self._waiting.get(lane)
            if waiting and not self._closed:
                self._start(lane, waiting.popleft())  # at the end of the queue, behind jobs of other places
                if not waiting:
                    del self._waiting[lane]
            elif self._running[lane] > 1:
                self._running[lane] -= 1
            else:
                del self._running[lane]
