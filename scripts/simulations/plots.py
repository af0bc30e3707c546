"""Draws a simulation's result. Its only user needs matplotlib; the format follows the file's name."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from report import Report

_QUANTILES = (10, 25, 50, 75, 90, 95, 99)


def keepalive(report: Report, path: Path) -> None:
    """A line of panels for each trace: how starts are distributed, how much memory idles, and the one against the
    other over ρ."""
    plt = _pyplot()
    traces = list(dict.fromkeys(f"{row['trace']}" for row in report.rows if "trace" in row))
    figure, axes = plt.subplots(len(traces), 3, figsize=(16, 5.5 * len(traces)), squeeze=False)
    for line, trace in zip(axes, traces, strict=True):
        values: dict[str, dict[float | None, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for row in report.rows:
            if row.get("trace") == trace and row["metric"] != "cost":
                rho = row.get("rho")
                values[f"{row['variant']}"][None if rho is None else _number(rho)][f"{row['metric']}"] = _number(
                    row["median"]
                )
        fixed = {name: by_rho[None] for name, by_rho in values.items() if None in by_rho}
        priced = {name: by_rho for name, by_rho in values.items() if None not in by_rho}
        middle = {name: _at_one(by_rho) for name, by_rho in priced.items()}
        _distributions(line[0], {**fixed, **middle}, trace)
        _memory(line[1], {**fixed, **middle})
        _pareto(line[2], fixed, priced)
    _finish(plt, figure, report, path)


def placement(report: Report, path: Path) -> None:
    """A bar per policy and seed, and the longest waits beside it."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, metric in zip(axes, ("mean", "p99"), strict=True):
        found: dict[str, list[float]] = defaultdict(list)
        for row in report.rows:
            found[f"{row['policy']}"].append(_number(row[metric]))
        names = list(found)[::-1]
        middles = [sorted(found[name])[len(found[name]) // 2] for name in names]
        reach = [
            [middle - min(found[name]) for name, middle in zip(names, middles, strict=True)],
            [max(found[name]) - middle for name, middle in zip(names, middles, strict=True)],
        ]
        axis.barh(names, middles, xerr=reach, color="0.75", ecolor="0.3", capsize=2)
        axis.set_xlabel(f"{metric}, seconds until the model is there")
        _plain(axis)
    _finish(plt, figure, report, path)


def _distributions(axis: Any, values: dict[str, dict[str, float]], trace: str) -> None:
    for name, metrics in values.items():
        if "," not in name and " by " not in name:
            axis.plot([metrics[f"p{q}_start_s"] for q in _QUANTILES], _QUANTILES, marker=".", label=name)
    axis.set_xlabel("start, s")
    axis.set_ylabel("% of calls")
    axis.set_title(f"{trace}: starts (priced rules at ρ = 1)", fontsize=9)
    axis.legend(fontsize=7)
    _plain(axis)


def _memory(axis: Any, values: dict[str, dict[str, float]]) -> None:
    names = sorted(values, key=lambda name: values[name]["idle_gb_s"])
    axis.barh(names, [values[name]["idle_gb_s"] for name in names], color="0.75")
    axis.set_xscale("log")
    axis.set_xlabel("idle memory, GB·s (priced rules at ρ = 1)")
    axis.tick_params(axis="y", labelsize=7)
    _plain(axis)


def _pareto(
    axis: Any, fixed: dict[str, dict[str, float]], priced: dict[str, dict[float | None, dict[str, float]]]
) -> None:
    for name, by_rho in priced.items():
        points = _ordered(by_rho)
        starts, memory = [point["mean_start_s"] for point in points], [point["idle_gb_s"] for point in points]
        axis.plot(starts, memory, marker=".", label=name)
    for name, point in fixed.items():
        axis.plot(point["mean_start_s"], point["idle_gb_s"], "x", color="0.3")
        axis.annotate(name, (point["mean_start_s"], point["idle_gb_s"]), fontsize=6)
    axis.set_yscale("log")
    axis.set_xlabel("mean start, s")
    axis.set_ylabel("idle memory, GB·s")
    axis.set_title("each line: ρ from little to much, right to left", fontsize=9)
    axis.legend(fontsize=7)
    _plain(axis)


def _at_one(by_rho: dict[float | None, dict[str, float]]) -> dict[str, float]:
    """At ρ = 1, or as near to it as a quick run came."""
    return by_rho[min(by_rho, key=lambda rho: abs((rho or 0.0) - 1.0))]


def _ordered(by_rho: dict[float | None, dict[str, float]]) -> list[dict[str, float]]:
    return [by_rho[rho] for rho in sorted(by_rho, key=lambda rho: rho or 0.0)]


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(plt: Any, figure: Any, report: Report, path: Path) -> None:
    note = f"; not to be quoted: {report.note}" if report.note else ""
    figure.suptitle(f"{report.name}, commit {report.commit}{note}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plain(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _number(value: str | float | None) -> float:
    assert isinstance(value, (int, float)), "figures are numbers"
    return float(value)
