"""The `scripts/bench` command: finds a benchmark, runs it, writes its result file, its plot and the README's tables."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click
from benchmarks import NAMES
from report import Report
from rich.console import Console
from rich.table import Table

CHOICES = [*NAMES, "all"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice(CHOICES))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Result file; a directory with `all`.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Plot (PNG or SVG); a directory with `all`.")
@click.option("--quick", is_flag=True, help="A smoke run of about a minute; its figures are not to be quoted.")
def main(name: str, json_file: Path | None, plot_file: Path | None, quick: bool) -> None:
    """Measure NAME on this machine and print the figures."""
    console = Console()
    # One thread before anything imports torch or numpy, unless a benchmark asks for more: results must not depend on
    # how many processors this machine has.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed = []
    for each in NAMES if name == "all" else [name]:
        module = importlib.import_module(f"benchmarks.{each.replace('-', '_')}")
        report: Report = module.run(quick, console)
        show(report, console)
        if quick:
            console.print("[yellow]A quick run: these figures are not to be quoted.[/]")
        for given, suffix, write in ((json_file, "json", Report.write), (plot_file, "png", _plot)):
            if given is not None:
                path = given / f"{each}.{suffix}" if name == "all" else given
                path.parent.mkdir(parents=True, exist_ok=True)
                write(report, path)
        if not report.trusted:
            failed.append(each)
    if failed:
        console.print(
            f"[red]The machine was too noisy to compare ({', '.join(failed)}): run again when nothing else uses it.[/]"
        )
        sys.exit(3)


def show(report: Report, console: Console) -> None:
    table = Table(title=f"{report.name}, commit {report.commit}", title_justify="left", box=None, pad_edge=False)
    for heading in ("figure", "value"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for metric, figure in report.headline.items():
        table.add_row(metric, f"{figure:g}")
    console.print(table)
    details = Table(box=None, pad_edge=False)
    names = list(dict.fromkeys(key for row in report.rows for key in row))
    for key in names:
        details.add_column(key)
    for row in report.rows:
        details.add_row(*("" if (value := row.get(key)) is None else f"{value}" for key in names))
    console.print(details)


def _plot(report: Report, path: Path) -> None:
    from benchmarks import plots

    plots.draw(report, path)


if __name__ == "__main__":
    main()
