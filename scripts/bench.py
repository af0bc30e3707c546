"""The `scripts/bench` command: finds a benchmark, runs it, writes its result file and its plot; or writes the README.

Exit codes: 2 when NAME is not built yet, 3 when the machine was too noisy to compare.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from benchmarks import NAMES, WAITING, built, module
from report import Report, Row
from rich.console import Console
from rich.table import Table

NOT_BUILT, NOISY = 2, 3
FIGURES = ("metric", "median", "q1", "q3", "min", "max", "runs")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice([*NAMES, "all", "tables"]))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Result file; a directory with `all`.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Plot (PNG or SVG); a directory with `all`.")
@click.option("--quick", is_flag=True, help="A smoke run of about a minute; its figures are not to be quoted.")
def main(name: str, json_file: Path | None, plot_file: Path | None, quick: bool) -> None:
    """Measure NAME on this machine and print the figures; `tables` writes the README's from the committed results."""
    console = Console()
    # Whatever a benchmark changed about the machine is given back on SIGTERM, too.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    # One thread unless a benchmark says otherwise: results must not depend on how many processors this machine has.
    os.environ["OMP_NUM_THREADS"] = "1"
    if name == "tables":
        from benchmarks import tables

        for changed in tables.write():
            console.print(f"{changed} is up to date")
        return
    if name != "all" and not built(name):
        console.print(f"{name} is not built yet: it waits for {WAITING[name]}.", highlight=False)
        sys.exit(NOT_BUILT)
    noisy = []
    for each in [name] if name != "all" else filter(built, NAMES):
        start = time.monotonic()
        report: Report = importlib.import_module(f"benchmarks.{module(each)}").run(quick, console)
        show(report, console)
        console.print(f"[dim]{each} took {time.monotonic() - start:.0f} s[/]")
        if json_file is not None:
            report.write(_target(json_file, each, "json", name))
        if plot_file is not None:
            from benchmarks import plots

            plots.draw(report, _target(plot_file, each, "png", name))
        if report.note:
            console.print(f"[yellow]Not to be quoted: {report.note}.[/]")
        if not report.trusted and not quick:
            noisy.append(each)
    if noisy:
        console.print(f"[red]{', '.join(noisy)}: run again when nothing else uses the machine.[/]")
        sys.exit(NOISY)


def _target(given: Path, each: str, suffix: str, name: str) -> Path:
    path = given / f"{each}.{suffix}" if name == "all" else given
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def show(report: Report, console: Console) -> None:
    figures = Table(title=f"{report.name}, commit {report.commit}", title_justify="left", box=None, pad_edge=False)
    figures.add_column("figure")
    figures.add_column("value", justify="right")
    for metric, figure in report.headline.items():
        figures.add_row(metric, f"{figure:g}")
    console.print(figures)
    details = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    lines = pivot(report.rows)
    names = list(dict.fromkeys(key for line in lines for key in line))
    for key in names:
        details.add_column(key, justify="left" if key in ("variant", "reason") else "right")
    for line in lines:
        details.add_row(*(line.get(key, "") for key in names))
    # Wide tables are for files and pagers; a narrow terminal would make confetti of them.
    console.print(details, width=max(console.width, 160), crop=False, no_wrap=True)


def pivot(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One line per variant and case, with a column per metric: the median, and the quartiles where there are any."""
    lines: dict[tuple[object, ...], dict[str, str]] = {}
    for row in rows:
        constant = {key: f"{value}" for key, value in row.items() if key not in FIGURES and value is not None}
        line = lines.setdefault(tuple(constant.items()), dict(constant))
        if row.get("median") is not None:
            quartiles = f" ({row['q1']:.3g}–{row['q3']:.3g})" if row["q1"] != row["q3"] else ""
            line[f"{row['metric']}"] = f"{row['median']:.4g}{quartiles}"
    return list(lines.values())


if __name__ == "__main__":
    main()
