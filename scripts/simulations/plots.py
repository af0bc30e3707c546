"""Draws a simulation's result for a talk: one claim a picture. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.plots import GREY, OTHER, OURS, THIRD, number, picture
from report import Report

_LINES = {"glowplug": OURS, "rainbowcake by ρ, zygotes": THIRD, "rainbowcake by ρ": OTHER}


def keepalive(report: Report, path: Path) -> None:
    """Draw idle memory against the mean start on the first trace: a line for rules with a price, points for others."""
    traces = [f"{row['trace']}" for row in report.rows if "trace" in row]
    values: dict[str, dict[float, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in report.rows:
        if row.get("trace") == traces[0] and row["metric"] in ("idle_gb_s", "mean_start_s"):
            values[f"{row['variant']}"][number(row.get("rho", 0.0))][f"{row['metric']}"] = number(row["median"])
    others: list[tuple[float, float]] = []
    title = "Less idle memory at the same mean start"
    with picture(
        report, title, f"arrivals of {traces[0]}; each line: its price from low to high", path, height=6
    ) as axes:
        for name, by_rho in values.items():
            points = [by_rho[rho] for rho in sorted(by_rho)]
            starts, memory = [each["mean_start_s"] for each in points], [each["idle_gb_s"] for each in points]
            if name in _LINES:
                axes.plot(starts, memory, marker="o", linewidth=3, color=_LINES[name], label=name)
            elif len(points) == 1 and "," not in name:
                others.append((starts[0], memory[0]))
        axes.plot(*zip(*others, strict=True), "x", markersize=9, color=GREY, label="rules that know no price")
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("mean start, seconds")
        axes.set_ylabel("idle memory, GB·s")
        axes.legend(frameon=False)


def placement(report: Report, path: Path) -> None:
    """Draw the mean start of each policy: the median of the seeds, and their range."""
    means: dict[str, list[float]] = defaultdict(list)
    for row in report.rows:
        means[f"{row['policy']}"].append(number(row["mean"]))
    names = sorted(means, key=lambda name: statistics.median(means[name]), reverse=True)
    middles = [statistics.median(means[name]) for name in names]
    reach = [
        [middle - min(means[name]) for name, middle in zip(names, middles, strict=True)],
        [max(means[name]) - middle for name, middle in zip(names, middles, strict=True)],
    ]
    colours = [OURS if name == "glowplug" else OTHER for name in names]
    with picture(
        report, "Where a model starts decides how soon", "medians of the seeds, and their range", path
    ) as axes:
        axes.barh(names, middles, xerr=reach, color=colours, ecolor="0.3", capsize=4, height=0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("mean seconds until the model is there")
