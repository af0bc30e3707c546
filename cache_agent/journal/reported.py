"""Owns what this node's functions tell of themselves: how they started, and which layers they keep."""

from __future__ import annotations

from cache_agent.journal.journal import Journal
from cache_agent.journal.layers import Layers
from cache_agent.journal.starts import Starts
from cache_agent.wire.layers import LayersTold
from cache_agent.wire.operations import Started


class FunctionReports:
    """For those who look at the node; nothing else follows from it. Any thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.starts, self.layers = Starts(), Layers()

    def hear(self, word: Started | LayersTold) -> None:
        if isinstance(word, LayersTold):
            self.layers.tell(word)
            return
        start, new = self.starts.add(word)
        if not new:
            return
        edges = [edge for span in start.spans for edge in (span.start, span.end)]
        seconds = (max(edges) - min(edges)) / 1e9 if edges else 0.0
        how = f"could not start: {start.error}" if start.error else f"started ({start.kind}) in {seconds:.2f} s"
        self._journal.record("started", start.model, f"{start.function} {how}")
