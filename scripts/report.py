"""The result file of a benchmark, with a description of the machine: one format for all benchmarks.

    {"name": …, "commit": …, "machine": {…}, "trusted": …, "note": …, "headline": {metric: number, …}, "rows": [{…}, …]}

`headline` has the figures that are compared and quoted, `rows` the measurements behind them. `trusted` is false when
the figures must not be quoted, and `note` says why: a quick run, or a machine too noisy to compare on, in which case
the headline is empty.

In the file, all metrics of one variant in one case are one entry, which people can read:

    {"variant": …, …, "runs": …, "metrics": {metric: [median, q1, q3], …}}
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "scripts/benchmarks/results"

_HEAD = ("name", "commit", "machine", "trusted", "note")
_FIGURES = ("median", "q1", "q3")
_WIDTH = 140

Row: TypeAlias = Mapping[str, str | float | None]


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark's result. `rows` are flat: text and numbers only."""

    name: str
    headline: Mapping[str, float]
    rows: Sequence[Row]
    trusted: bool = True
    note: str = ""
    commit: str = field(default_factory=lambda: commit())
    machine: Mapping[str, str | float] = field(default_factory=lambda: machine())

    def write(self, path: Path) -> None:
        """Write the result file, a line per part or entry."""
        parts = [f" {_packed({name: getattr(self, name)})[1:-1]}" for name in _HEAD]
        parts.append(
            ' "headline": {' + ",".join(f"\n  {_pair(*item)}" for item in sorted(self.headline.items())) + "\n }"
        )
        parts.append(' "rows": [' + ",".join(f"\n  {_packed(entry)}" for entry in _together(self.rows)) + "\n ]")
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def read(path: Path) -> Report:
    """Read a result file. Raises `TypeError` or `ValueError` for a file that no benchmark has written."""
    found = json.loads(path.read_text())
    return Report(**{**found, "rows": [row for entry in found["rows"] for row in _apart(entry)]})


def _together(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a file: one for rows in sequence that differ in nothing but their metric and its figures."""
    entry: dict[str, Any] = {}
    for row in rows:
        if "metric" not in row or not row.keys() >= set(_FIGURES):
            if entry:
                yield entry
            entry = {}
            yield _ordered(row, row)
            continue
        case = _ordered(row, [key for key in row if key not in ("metric", *_FIGURES)])
        if (
            not entry
            or case != {key: entry[key] for key in entry if key != "metrics"}
            or row["metric"] in entry["metrics"]
        ):
            if entry:
                yield entry
            entry = {**case, "metrics": {}}
        entry["metrics"][row["metric"]] = [row[figure] for figure in _FIGURES]
    if entry:
        yield entry


def _ordered(row: Row, keys: Iterable[str]) -> dict[str, Any]:
    """Return these members of a row, by name, but the variant first."""
    return {key: row[key] for key in sorted(keys, key=lambda key: (key != "variant", key))}


def _apart(entry: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of an entry."""
    if "metrics" not in entry:
        yield entry
        return
    case = {key: value for key, value in entry.items() if key != "metrics"}
    for metric, figures in entry["metrics"].items():
        yield {**case, "metric": metric, **dict(zip(_FIGURES, figures, strict=True))}


def _packed(entry: Mapping[str, object]) -> str:
    """Return the object as JSON, with as many of its members, and of its members' members, on a line as fit."""
    lines = [""]
    for member in _members(entry):
        if lines[-1] and len(lines[-1]) + len(member) > _WIDTH:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + member
    return "\n   ".join(lines)


def _members(entry: Mapping[str, object]) -> list[str]:
    found: list[str] = []
    for key, value in entry.items():
        inner = _members(value) if isinstance(value, Mapping) and value else []
        found += [f"{json.dumps(key)}: {inner[0]}", *inner[1:]] if inner else [_pair(key, value)]
        found[-1] += ","
    found[0] = "{" + found[0]
    found[-1] = found[-1].removesuffix(",") + "}"
    return found


def _pair(key: str, value: object) -> str:
    return f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"


def commit() -> str:
    """Return the checked-out commit, with "+" when files differ from it; "unknown" outside a checkout.

    Result files are not compared: a run of all benchmarks writes the first one before it measures the second.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", ".", f":(exclude){RESULTS}") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, str | float]:
    """Describe this machine and its software, so that a reader can judge the figures."""
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    return {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
