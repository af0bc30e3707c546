"""The `scripts/bench` command: finds a benchmark, runs it, writes its result file and its plot; or writes the tables.

Exit code 3: the machine was too noisy to compare.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import click
from benchmarks import NAMES, module
from report import Report
from rich.console import Console
from rich.table import Table

NOISY = 3
PLAIN = ("variant", "reason", "metric", "median", "q1", "q3", "runs")  # all other keys of a row name its case


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice([*NAMES, "all", "tables"]))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Result file; a directory with `all`.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    help="Picture (PNG or SVG), if it has one; a directory with `all`.",
)
@click.option("--quick", is_flag=True, help="A smoke run of about a minute; its figures are not to be quoted.")
def main(name: str, json_file: Path | None, plot_file: Path | None, quick: bool) -> None:
    """Measure NAME on this machine and print the figures; `tables` writes those of the pages, and plots."""
    console = Console()
    # SIGTERM ends the run as an exception does, so that benchmarks undo their changes of the machine.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    # One thread unless a benchmark says otherwise: results must not depend on how many processors this machine has.
    os.environ["OMP_NUM_THREADS"] = "1"
    if name == "tables":
        from benchmarks import tables

        for changed in tables.write():
            console.print(f"{changed} is up to date")
        return
    noisy = []
    for each in [name] if name != "all" else NAMES:
        start = time.monotonic()
        report: Report = importlib.import_module(f"benchmarks.{module(each)}").run(quick, console)
        show(report, console)
        console.print(f"[dim]{each} took {time.monotonic() - start:.0f} s[/]")
        if json_file is not None:
            report.write(_target(json_file, each, "json", name))
        if plot_file is not None:
            from benchmarks import plots

            if not plots.draw(report, _target(plot_file, each, "png", name)) and name != "all":
                console.print(f"[yellow]{each} has no picture: its figures are for a table.[/]")
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
    """Print the headline and the rows of a report."""
    figures = Table(title=f"{report.name}, commit {report.commit}", title_justify="left", box=None, pad_edge=False)
    figures.add_column("figure")
    figures.add_column("value", justify="right")
    for metric, figure in report.headline.items():
        figures.add_row(metric, f"{figure:g}")
    console.print(figures)
    details = Table(box=None, pad_edge=False)
    for heading in ("variant", "metric", "median", "quartiles"):
        details.add_column(heading, justify="left" if heading in ("variant", "metric") else "right")
    last = ""
    for row in report.rows:
        name = ", ".join([f"{row['variant']}", *(f"{row[key]} {key}" for key in row if key not in PLAIN)])
        if row.get("reason"):
            details.add_row(f"{name} [dim]did not run: {row['reason']}[/]")
        else:
            quartiles = f"{row['q1']:.4g} … {row['q3']:.4g}" if row["q1"] != row["q3"] else ""
            details.add_row(name if name != last else "", f"{row['metric']}", f"{row['median']:.4g}", quartiles)
        last = name
    console.print(details)


if __name__ == "__main__":
    main()
