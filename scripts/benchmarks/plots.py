"""Draws a result file: a bar per variant for each metric that has a unit, with the quartiles as whiskers."""

from __future__ import annotations

from pathlib import Path

from report import Report

_UNITS = {"_s": "seconds", "_ms": "milliseconds", "_mb": "megabytes", "_mb_s": "MB/s"}


def draw(report: Report, path: Path) -> None:
    """One panel per metric; the format follows the file's name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in report.rows if isinstance(row.get("median"), (int, float))]
    metrics = list(dict.fromkeys(str(row["metric"]) for row in rows))
    figure, axes = plt.subplots(
        len(metrics), 1, figsize=(9, 1.2 + sum(0.9 + 0.3 * _count(rows, m) for m in metrics)), squeeze=False
    )
    for axis, metric in zip(axes[:, 0], metrics, strict=True):
        shown = [row for row in rows if row["metric"] == metric][::-1]
        names = [" ".join(str(row[key]) for key in ("variant", "case") if row.get(key) is not None) for row in shown]
        middles = [_number(row["median"]) for row in shown]
        whiskers = [
            [m - _number(row["q1"]) for m, row in zip(middles, shown, strict=True)],
            [_number(row["q3"]) - m for m, row in zip(middles, shown, strict=True)],
        ]
        axis.barh(range(len(shown)), middles, xerr=whiskers, color="0.65", ecolor="0.2", capsize=2, height=0.7)
        for place, middle in enumerate(middles):
            axis.text(middle, place, f" {middle:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(shown)), names, fontsize=8)
        axis.set_xlim(left=0)
        unit = next((text for suffix, text in _UNITS.items() if metric.endswith(suffix)), "")
        axis.set_xlabel(f"{metric} ({unit})" if unit else metric, fontsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    machine = report.machine
    figure.suptitle(
        f"{report.name}: commit {report.commit}, {machine['cpus']} × {machine['processor']}, torch {machine['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _count(rows: list[dict[str, str | float | None]] | list[object], metric: str) -> int:
    return sum(1 for row in rows if isinstance(row, dict) and row["metric"] == metric)


def _number(value: object) -> float:
    assert isinstance(value, (int, float)), "rows without figures were left out"
    return float(value)
