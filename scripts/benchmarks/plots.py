"""Draws a result: a panel per metric, a bar per variant, the quartiles as whiskers; ratios share one panel."""

from __future__ import annotations

from pathlib import Path

from report import Report, Row

_UNITS = {"mb_s": "MB/s", "_s": "seconds", "_ms": "milliseconds", "_mb": "megabytes"}  # the first that fits
_RATIO = "(ratio)"
_FIGURES = ("metric", "median", "q1", "q3", "min", "max", "runs", "reason")


def draw(report: Report, path: Path) -> None:
    """The format follows the file's name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, list[Row]] = {}
    for row in report.rows:
        # Phases of a start, whose names have spaces, are for the tables: there are too many to be seen at once.
        if row.get("median") is not None and row["variant"] != "(machine)" and " " not in f"{row['metric']}":
            ratio = row["variant"] == _RATIO
            panels.setdefault("ratio" if ratio else f"{row['metric']}", []).append(row)
    heights = [0.9 + 0.3 * len(rows) for rows in panels.values()] or [1.0]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(9, 1.2 + sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (metric, rows) in zip(axes[:, 0], panels.items(), strict=False):
        shown = rows[::-1]
        middles = [_number(row["median"]) for row in shown]
        whiskers = [
            [max(0.0, middle - _number(row["q1"])) for middle, row in zip(middles, shown, strict=True)],
            [max(0.0, _number(row["q3"]) - middle) for middle, row in zip(middles, shown, strict=True)],
        ]
        shades = ["0.45" if f"{row['variant']}".startswith("glowplug") else "0.8" for row in shown]
        axis.barh(range(len(shown)), middles, xerr=whiskers, color=shades, ecolor="0.2", capsize=2, height=0.7)
        for place, middle in enumerate(middles):
            axis.text(middle + whiskers[1][place], place, f" {_short(middle)}", va="center", fontsize=8)
        axis.set_yticks(range(len(shown)), [_name(row, rows) for row in shown], fontsize=8)
        axis.set_xlim(left=0)
        unit = next((text for suffix, text in _UNITS.items() if metric.endswith(suffix)), "")
        axis.set_xlabel(f"{metric} ({unit})" if unit else metric, fontsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    machine = report.machine
    title = (
        f"{report.name}: commit {report.commit}, {machine['cpus']} × {machine['processor']}, torch {machine['torch']}"
    )
    figure.suptitle(title + (f"\nnot to be quoted: {report.note}" if report.note else ""), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _name(row: Row, rows: list[Row]) -> str:
    """The variant, and what tells its case from the others of this panel."""
    if row["variant"] == _RATIO:
        return f"{row['metric']}"
    keys = [key for key in row if key not in _FIGURES]
    telling = [key for key in keys if key == "variant" or len({other.get(key) for other in rows}) > 1]
    return ", ".join(f"{row[key]}" if key == "variant" else f"{row[key]} {key}" for key in telling)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: object) -> float:
    assert isinstance(value, (int, float)), "rows without figures were left out"
    return float(value)
