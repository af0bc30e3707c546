"""Traces of requests: Azure's of LLM inference, or a synthetic one of similar statistics where that is absent."""

from __future__ import annotations

import csv
import os
import random
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

FILE = "traces/azure-llm-2023-code.csv"


class Request(NamedTuple):
    """A request: `arrival` in seconds from the trace's begin, and its tokens read and written."""

    arrival: float
    context: int
    generated: int


def load(path: Path | None = None) -> tuple[list[Request], str]:
    """Return the requests in order of arrival, and the trace's name. Raises `OSError` for a file that is not there."""
    data = os.environ.get("GLOWPLUG_TEST_DATA")
    if path is None and data and (Path(data) / FILE).exists():
        path = Path(data) / FILE
    if path is None:
        return synthetic(), "synthetic"
    with path.open(newline="") as file:
        rows = [
            (datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(), row["ContextTokens"], row["GeneratedTokens"])
            for row in csv.DictReader(file)
        ]
    begin = min(rows)[0]
    return sorted(Request(at - begin, int(context), int(written)) for at, context, written in rows), path.name


def synthetic(count: int = 8800, hours: float = 1.0, seed: int = 0) -> list[Request]:
    """Make requests: Poisson arrivals, log-normal lengths like Azure's code trace (medians of 1,500 and 15 tokens)."""
    source = random.Random(seed)  # noqa: S311
    at, requests = 0.0, []
    for _ in range(count):
        at += source.expovariate(count / (hours * 3600))
        context = min(8000, int(source.lognormvariate(7.3, 0.9)) + 1)
        requests.append(Request(at, context, min(2000, int(source.lognormvariate(2.7, 0.9)) + 1)))
    return requests
