"""Pictures of results: one claim each. Results without a curve or phases stay in the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from report import Report, Row

OURS, OTHER, THIRD, GREY = "#1f4e79", "#b5651d", "#4d7c57", "#8a8a8a"
_PHASES = {
    "Python and HTTP server": (
        (
            "python and gunicorn",
            "flask",
            "shim: exec",
            "shim: python",
            "shim: listen",
            "worker: python",
            "worker: http",
        ),
        "#c9c9c9",
    ),
    "imports: torch, transformers, tokenizer": (
        ("torch", "transformers", "tokenizer", "worker: imports", "worker: model code"),
        OTHER,
    ),
    "fork of a warm process": (("worker: fork from lang", "worker: fork from model"), THIRD),
    "model on its weights": (
        ("model", "worker: attach", "worker: weights", "worker: engine", "worker: handler"),
        "#7fa6c9",
    ),
}
_LAST = ("first token, and the rest", OURS)  # the rest of the whole beside its phases
_STARTS = {
    "plain, warm": "plain: Flask and transformers",
    "glowplug agent, warm": "Glowplug, first start",
    "glowplug node, lang": "Glowplug, forked after the imports",
    "glowplug node, model": "Glowplug, forked with the model",
}


@contextmanager
def picture(report: Report, title: str, caption: str, path: Path, *, height: float = 4.6) -> Iterator[Any]:
    """Yield the one pair of axes of a picture that says `title`; the format follows the file's name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
        yield axes
        figure.suptitle(title, fontsize=18, fontweight="bold", x=0.01, ha="left")
        machine = report.machine
        where = f"{machine['cpus']} × {machine['processor']}, commit {report.commit}"
        note = f". Not to be quoted: {report.note}" if report.note else ""
        figure.supxlabel(f"{caption}; {where}{note}", fontsize=10, color="0.35", x=0.01, ha="left")
        figure.savefig(path, dpi=100)
        pyplot.close(figure)


def draw(report: Report, path: Path) -> bool:
    """Draw a report's picture; return whether it has one."""
    drawn = PICTURES.get(report.name)
    if drawn is not None:
        drawn(report, path)
    return drawn is not None


def number(value: str | float | None) -> float:
    assert isinstance(value, (int, float)), "figures are numbers"
    return float(value)


def _medians(rows: Sequence[Row], **case: str | float) -> dict[str, dict[str, float]]:
    """Return variant → metric → median, of the rows of this case."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("median") is not None and all(row.get(key) == value for key, value in case.items()):
            found.setdefault(f"{row['variant']}", {})[f"{row['metric']}"] = number(row["median"])
    return found


def _first(report: Report, key: str, otherwise: str | float) -> str | float:
    return next((row[key] or otherwise for row in report.rows if key in row), otherwise)


def _cold_start(report: Report, path: Path) -> None:
    model = _first(report, "model", "")
    starts = _medians(report.rows, model=model)
    shown = [name for name in _STARTS if name in starts]
    slow, quick = (
        starts.get(name, {}).get("first_token_ms", 0.0) / 1e3 for name in ("plain, warm", "glowplug node, lang")
    )
    title = f"First token after {quick:.1f} s instead of {slow:.1f} s: a fork imports nothing"
    tokens = _first(report, "prompt_tokens", 0)
    caption = f"Llama {model}, prompt of {tokens} tokens, libraries in the page cache"
    with picture(report, title, caption, path) as axes:
        lefts = dict.fromkeys(shown, 0.0)
        for phase, (metrics, colour) in _PHASES.items():
            widths = [sum(starts[name].get(f"{metric} ms", 0.0) for metric in metrics) / 1e3 for name in shown]
            axes.barh(shown, widths, left=list(lefts.values()), color=colour, label=phase, height=0.6)
            lefts = {name: left + width for (name, left), width in zip(lefts.items(), widths, strict=True)}
        whole = {name: starts[name]["first_token_ms"] / 1e3 for name in shown}
        rest = [max(0.0, whole[name] - lefts[name]) for name in shown]
        axes.barh(shown, rest, left=list(lefts.values()), color=_LAST[1], label=_LAST[0], height=0.6)
        for place, name in enumerate(shown):
            axes.text(max(whole[name], lefts[name]), place, f" {whole[name]:.2f} s", va="center", fontweight="bold")
        axes.set_yticks(range(len(shown)), [_STARTS[name] for name in shown])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds from the container's entrypoint to the first token")
        axes.set_xlim(0, 1.15 * max([*whole.values(), 0.01]))
        axes.legend(loc="lower right", fontsize=12, frameon=False)


def _density(report: Report, path: Path) -> None:
    found = _medians(report.rows)
    curves = {
        kind: {
            int(name.partition(" x")[2]): figures["weights_mb"] / 1e3
            for name, figures in found.items()
            if name.startswith(f"{kind} x") and "weights_mb" in figures
        }
        for kind in ("plain", "glowplug")
    }
    most = max(curves["glowplug"], default=1)
    title = f"{_word(most)} replicas hold the weights once"
    with picture(report, title, f"{_first(report, 'model', '')}, weights in memory, page cache dropped", path) as axes:
        for kind, colour, name in (
            ("plain", OTHER, "plain: a copy for each"),
            ("glowplug", OURS, "Glowplug: one for all"),
        ):
            _curve(axes, curves[kind], colour, name)
        missing = [row for row in report.rows if f"{row['variant']}".startswith("plain x") and row.get("reason")]
        if missing and curves["plain"]:
            at, size = max(curves["plain"].items())
            count = int(f"{missing[0]['variant']}".partition(" x")[2])
            axes.plot([at, count], [size, size * count / at], color=OTHER, linestyle=":", linewidth=2)
            place = {"textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate("does not fit here", (count, size * count / at), (0, -50), color=OTHER, **place)
        axes.set_xticks(sorted({count for curve in curves.values() for count in curve} or {1}))
        axes.set_xlabel("replicas of one function on a node")
        axes.set_ylabel("weights in memory, GB")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", frameon=False)


def _fanout(report: Report, path: Path) -> None:
    found = {
        name: figures["egress_copies"] for name, figures in _medians(report.rows).items() if "egress_copies" in figures
    }
    nodes = int(number(_first(report, "agents", 1)))
    whole = {count: found[name] for count, name in ((1, "one agent"), (nodes, "all agents")) if name in found}
    title = f"{_word(nodes)} nodes that start together read the origin {found.get('all agents', 0):.1f} times"
    rate = number(_first(report, "link_mb_s", 0))
    with picture(report, title, f"each node behind a link of {rate:g} MB/s", path) as axes:
        axes.plot(
            [1, nodes], [1, nodes], color=OTHER, linestyle="--", linewidth=2, label="each for itself (arithmetic)"
        )
        _curve(axes, whole, OURS, "Glowplug: nodes give each other what they read")
        if (killed := found.get("all agents, two are killed")) is not None:
            axes.plot([nodes], [killed], "D", color=THIRD, markersize=9, label="the same, two nodes killed on the way")
            axes.annotate(
                f"{killed:.2g}", (nodes, killed), (-12, 8), textcoords="offset points", ha="right", color=THIRD
            )
        axes.set_xticks(range(1, nodes + 1))
        axes.set_xlabel("nodes that load the model at once")
        axes.set_ylabel("copies read from the origin")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", frameon=False)


def _curve(axes: Any, curve: Mapping[int, float], colour: str, name: str) -> None:
    """Draw a curve with its last value beside it."""
    axes.plot(list(curve), list(curve.values()), marker="o", markersize=8, linewidth=3, color=colour, label=name)
    if curve:
        last, value = max(curve.items())
        axes.annotate(f"{value:.2g}", (last, value), (0, -22), textcoords="offset points", ha="center", color=colour,
                      fontweight="bold")  # fmt: skip


def _word(count: int) -> str:
    return {2: "Two", 4: "Four", 8: "Eight"}.get(count, f"{count}")


PICTURES: Mapping[str, Callable[[Report, Path], None]] = {
    "cold-start": _cold_start,
    "density": _density,
    "fanout": _fanout,
}
