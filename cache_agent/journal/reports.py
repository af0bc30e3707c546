"""Owns what this node's functions report of themselves: how they started, and which layers they keep."""

from __future__ import annotations

import time
from collections import OrderedDict
from threading import Lock

from cache_agent.journal.journal import Journal
from cache_agent.journal.layers import Layers
from cache_agent.wire.layers import LayersReport
from cache_agent.wire.operations import Start, Started

KEPT = 64


class FunctionReports:
    """Starts and layers, for people that look at the node; the agent decides nothing by them. Any thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.starts, self.layers = Starts(), Layers()

    def add(self, report: Started | LayersReport) -> None:
        """Keep a report; a start that is new is an event of the journal, too."""
        if isinstance(report, LayersReport):
            self.layers.add(report)
            return
        start, new = self.starts.add(report)
        if not new:
            return
        edges = [edge for span in start.spans for edge in (span.start, span.end)]
        seconds = (max(edges) - min(edges)) / 1e9 if edges else 0.0
        how = f"could not start: {start.error}" if start.error else f"started ({start.kind}) in {seconds:.2f} s"
        self._journal.record("started", start.model, f"{start.function} {how}")


class Starts:
    """The ledgers of the last `KEPT` starts. Any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._starts: OrderedDict[str, Start] = OrderedDict()

    def add(self, report: Started) -> tuple[Start, bool]:
        """Keep a start, or what has become of a known one, and return it with whether it is new.

        A function reports its start twice: when it is ready, and again when its first token is out.
        """
        now, now_ns = time.time(), time.monotonic_ns()
        began = min((span.start for span in report.spans), default=now_ns)
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        start = Start(began=now - (now_ns - began) / 1e9, **fields)
        with self._lock:
            new = start.start_id not in self._starts
            self._starts[start.start_id] = start  # a known one keeps its place
            if len(self._starts) > KEPT:
                self._starts.popitem(last=False)
        return start, new

    def recent(self) -> list[Start]:
        """The starts, the newest first."""
        with self._lock:
            return list(reversed(self._starts.values()))
