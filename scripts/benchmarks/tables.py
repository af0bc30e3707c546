"""The tables of measurements, and the plots beside them, written from committed results: no figure is typed by hand.

The text between `<!-- bench: NAME -->` and `<!-- bench: end -->` is made from `results/NAME.json`. A result that is not
to be quoted is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import report
from report import Report, Row

from benchmarks import plots

PAGES = tuple(report.ROOT / "scripts" / folder / "README.md" for folder in ("benchmarks", "simulations"))
PLOTS = report.ROOT / ".github" / "plots"
FROM_PAGES = os.path.relpath(PLOTS, PAGES[0].parent)
"""The plots' folder as each of the pages links to it; all pages lie equally deep."""
RESULTS = report.ROOT / report.RESULTS
_PLACE = re.compile(r"(<!-- bench: (?!end)(?P<name>[\w-]+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)
_NOT_CASE = ("variant", "metric", "reason", "median", "q1", "q3", "runs")


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a table: heading → metric of its columns.

    `case` picks the rows where several cases were measured: those with one of these values; None is a row without the
    key.
    """

    columns: Mapping[str, str]
    case: Mapping[str, str | float | tuple[str | float | None, ...]]


_SHAPES = {
    "cold-start": Shape(
        {
            "HTTP answers, ms": "http_ready_ms",
            "first token, ms": "first_token_ms",
            "the same worker's next, ms": "warm_token_ms",
        },
        {},
    ),
    "load": Shape({"first token after, s": "first_s", "CPU, s": "cpu_s"}, {"threads": 1, "pages": "huge"}),
    "origin": Shape(
        {"in memory, s": "load_s", "MB/s": "mb_s", "first token after, s": "first_s", "CPU, s": "cpu_s"}, {}
    ),
    "density": Shape(
        {
            "copies of the weights": "copies",
            "next token, ms": "warm_token_ms",
            "copies after pressure": "evicted_copies",
            "token after pressure, ms": "evicted_token_ms",
        },
        {},
    ),
    "throughput": Shape({"tokens/s": "tokens_s", "CPU, ms per token": "cpu_ms_per_token"}, {}),
    "keepalive": Shape(
        {"idle memory, GB·s": "idle_gb_s", "mean start, s": "mean_start_s", "P99, s": "p99_start_s"},
        {"trace": ("rainbowcake", "synthetic"), "rho": (None, 1.0)},
    ),
}


def write() -> list[str]:
    """Renew the pages and the plots; return the names of the files that are up to date now."""
    for page in PAGES:
        page.write_text(rendered(page.read_text(), RESULTS))
    PLOTS.mkdir(exist_ok=True)
    drawn = [name for name in plots.PICTURES if (RESULTS / f"{name}.json").exists()]
    for name in drawn:
        plots.draw(report.read(RESULTS / f"{name}.json"), PLOTS / f"{name}.png")
    written = [*PAGES, *(PLOTS / f"{name}.png" for name in drawn)]
    return [str(path.relative_to(report.ROOT)) for path in written]


def rendered(text: str, results: Path) -> str:
    """Return the text with every marked place filled. Raises `ValueError` for a result that must not be quoted."""

    def fill(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        return match[1] + (_table(report.read(path)) if path.exists() else _absent(match["name"])) + match[3]

    return _PLACE.sub(fill, text)


def _absent(name: str) -> str:
    return f"Not measured on a quiet machine yet: `scripts/bench {name}`.\n"


def _table(found: Report) -> str:
    if not found.trusted or found.commit.endswith("+"):
        why = found.note or f"it was measured with uncommitted changes ({found.commit})"
        raise ValueError(f"the result of {found.name} is not to be quoted: {why}")
    shape = _SHAPES.get(found.name)
    blocks = [_figures(found)]
    if shape is not None:
        blocks.insert(0, _variants(found, shape))
    return "\n".join([*blocks, _origin_of(found)])


def _spreads(found: Report) -> dict[str, Row]:
    """Return the spread behind each ratio of the headline; the first case has the plain name."""
    spreads: dict[str, Row] = {}
    for row in found.rows:
        if row["variant"] == "(ratio)":
            spreads.setdefault(f"{row['metric']}", row)
    return spreads


def _picked(rows: Sequence[Row], shape: Shape) -> list[Row]:
    case = {key: value if isinstance(value, tuple) else (value,) for key, value in shape.case.items()}
    variants = [row for row in rows if not f"{row['variant']}".startswith("(")]
    return [row for row in variants if all(row.get(key) in values for key, values in case.items())]


def _variants(found: Report, shape: Shape) -> str:
    """Return a line per variant and case, with a column of medians per metric."""
    rows = [row for row in found.rows if not f"{row['variant']}".startswith("(")]
    picked = _picked(rows, shape)
    reasons = [f"- {row['variant']}: {row['reason']}" for row in rows if row.get("reason")]
    varying = [key for key in _case(picked) if len({row.get(key) for row in picked if "metric" in row}) > 1]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in picked:
        if "metric" in row and row["metric"] in shape.columns.values():
            name = (f"{row['variant']}", *(f"{row.get(key, '')}" for key in varying))
            lines.setdefault(name, {})[f"{row['metric']}"] = _number(row["median"])
    head = ["variant", *varying, *shape.columns]
    table = [_line(head), "|" + "---|" * (1 + len(varying)) + "---:|" * len(shape.columns)]
    table += [_line([*name, *(cells.get(m, "") for m in shape.columns.values())]) for name, cells in lines.items()]
    fixed = {key: row[key] for row in picked for key in _case([row]) if key not in varying and "metric" in row}
    text = "\n".join(table) + "\n"
    if fixed:
        text += (
            "\nAll of it with " + ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in fixed.items()) + ".\n"
        )
    return text + ("\nNot measured:\n\n" + "\n".join(dict.fromkeys(reasons)) + "\n" if reasons else "")


def _figures(found: Report) -> str:
    """Return the headline's lines: each figure, and the quartiles of those that are ratios taken round by round."""
    spreads = _spreads(found)
    lines = [_line(["figure", "median", "quartiles"]), "|---|---:|---:|"]
    for key, value in found.headline.items():
        quartiles = f"{_number(spreads[key]['q1'])} … {_number(spreads[key]['q3'])}" if key in spreads else ""
        lines.append(_line([key, _number(value), quartiles]))
    return "\n".join(lines) + "\n"


def _origin_of(found: Report) -> str:
    m = found.machine
    plot = f"[Plot]({FROM_PAGES}/{found.name}.png). " if found.name in plots.PICTURES else ""
    return plot + (
        f"Commit {found.commit}; {m['cpus']} × {m['processor']}, {m['memory_gib']} GiB, Linux {m['kernel']}, "
        f"Python {m['python']}, torch {m['torch']}, transformers {m['transformers']}.\n"
    )


def _case(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key not in _NOT_CASE))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: str | float | None) -> str:
    """Write a number with three digits, as many as a reader can use."""
    assert isinstance(value, (int, float)), "figures are numbers"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
