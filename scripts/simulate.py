"""The command line of `scripts/simulate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import Report
from simulations import keepalive, placement, plots, trace


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run the shipped policies, and others to compare them with, on a trace."""


@main.command("placement")
@click.option("--trace", "path", type=Path, help="CSV of Azure's LLM traces; without it the one in GLOWPLUG_TEST_DATA.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each policy.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0.01),
    default=1.0,
    show_default=True,
    help="How much faster the requests come.",
)
@click.option("--quick", is_flag=True, help="A smoke run: its figures are not to be quoted.")
@click.option("--json", "json_path", type=Path, help="Write the result here.")
@click.option("--plot", "plot_path", type=Path, help="Draw it here (PNG or SVG); needs matplotlib.")
def run_placement(
    path: Path | None, seeds: int, speed: float, quick: bool, json_path: Path | None, plot_path: Path | None
) -> None:
    """Compare policies that choose where a model starts: 20 nodes, 50 models, Zipf popularity; in seconds of start."""
    requests, source = trace.load(path)
    if quick:
        requests, seeds = requests[:800], 1
    rows = placement.compare(requests, seeds=seeds, speed=speed)
    click.echo(f"{len(requests)} requests ({source}), {speed:g} times as fast, {seeds} seeds")
    click.echo(f"{'policy':16} {'mean s':>8} {'P99 s':>8} {'spread of means':>18} {'cold':>6}   starts by tier")
    for row in placement.summary(rows):
        click.echo(
            f"{row['policy']:16} {row['mean']:8.3f} {row['p99']:8.2f} {row['lowest']:8.3f} – {row['highest']:.3f} "
            f"{row['cold']:7.0%}   {row['tiers']}"
        )
    headline = {
        f"{row['policy']} {what}": float(row[what]) for row in placement.summary(rows) for what in ("mean", "p99")
    }
    found = [{"trace": source, "speed": speed, **row} for row in rows]
    report = Report("placement", headline, found, not quick, "a quick run" if quick else "")
    if json_path is not None:
        report.write(json_path)
    if plot_path is not None:
        plots.placement(report, plot_path)


@main.command("keepalive")
@click.option("--trace", "path", type=Path, help="CSV of arrivals per minute, functions.csv beside it, or Azure's.")
@click.option("--seeds", type=click.IntRange(min=1), default=20, show_default=True, help="Splits by function.")
@click.option("--quick", is_flag=True, help="A smoke run: its figures are not to be quoted.")
@click.option("--json", "json_path", type=Path, help="Write the result here.")
@click.option("--plot", "plot_path", type=Path, help="Draw it here (PNG or SVG); needs matplotlib.")
def run_keepalive(path: Path | None, seeds: int, quick: bool, json_path: Path | None, plot_path: Path | None) -> None:
    """Compare rules of how long idle layers are kept: the shipped one and seven others.

    Without a trace, those of GLOWPLUG_TEST_DATA are used, or a synthetic one.
    """
    try:
        report = keepalive.run(path, seeds=min(seeds, 2) if quick else seeds, quick=quick)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for line in keepalive.text(report):
        click.echo(line)
    if json_path is not None:
        keepalive.summary(report).write(json_path)
    if plot_path is not None:
        plots.keepalive(report, plot_path)


if __name__ == "__main__":
    main()
