"""The results of `scripts/bench` can be trusted: rounds, ratios, refusals, result files, pages. Nothing is timed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import bench  # noqa: E402
import report  # noqa: E402
from benchmarks import NAMES, harness, machine, module, plots, tables  # noqa: E402
from benchmarks.harness import Result, Unavailable, Variant, judged, measure, ratio_rows  # noqa: E402
from documented import PAGES, rows  # noqa: E402
from report import Report  # noqa: E402

MACHINE = {
    "processor": "CPU",
    "cpus": 2,
    "memory_gib": 8.0,
    "kernel": "6.0",
    "python": "3.11",
    "torch": "2",
    "transformers": "5",
    "load_average": 0.1,
}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing else happens, and every probe takes the same time."""
    monkeypatch.setattr(machine, "probe", lambda: 0.01)
    monkeypatch.setattr(machine, "others", lambda: 0.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))


def result(**samples: list[float]) -> Result:
    """Variants with one metric, `s`, on a quiet machine."""
    named = {name: [{"s": value} for value in values] for name, values in samples.items()}
    return Result(named, {}, [0.01] * 4, [0.0] * 4, 0.5)


# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
def test_variants_are_interleaved_and_their_order_changes(console: Console) -> None:
    order: list[str] = []

    def variant(name: str) -> Variant:
        return Variant(name, lambda: order.append(name) or {"s": 1.0}, lambda: order.append(f"before {name}"))

    found = measure([variant("a"), variant("b"), variant("c")], 2, title="t", console=console)
    runs = [name for name in order if not name.startswith("before")]
    assert runs == ["a", "b", "c", "b", "c", "a"]
    assert all(order[order.index(f"before {n}") + 1] == n for n in "abc")
    assert list(found.samples) == ["a", "b", "c"]
    assert len(found.probes) == len(found.busy) == 3, "before each round and after the last"


def test_a_disturbed_round_is_repeated(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    busy = iter([0.0, 0.9, 0.1, 0.0, 0.9, 0.9, 0.9])  # the second look sees somebody: the first round does not count
    monkeypatch.setattr(machine, "probe", lambda: 0.01)
    monkeypatch.setattr(machine, "others", lambda: next(busy))
    runs = iter(range(10))
    found = measure([Variant("a", lambda: {"s": float(next(runs))})], 2, title="t", console=console)
    assert [sample["s"] for sample in found.samples["a"]] == [1.0, 3.0]
    assert (found.busy, found.repeated) == ([0.1, 0.0, 0.9], 2), "kept in the end: this machine does not become quiet"
    assert any(row.get("metric") == "repeated_rounds" and row["median"] == 2 for row in found.rows())


def test_a_probe_that_is_slow_counts_as_a_disturbance(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    probes = iter([0.01, 0.01, 0.02, 0.01, 0.01])
    monkeypatch.setattr(machine, "probe", lambda: next(probes))
    monkeypatch.setattr(machine, "others", lambda: 0.0)
    runs = iter(range(10))
    found = measure([Variant("a", lambda: {"s": float(next(runs))})], 2, title="t", console=console)
    assert ([sample["s"] for sample in found.samples["a"]], found.drift) == ([0.0, 2.0], 1.0)


@pytest.mark.usefixtures("quiet")
def test_a_variant_that_cannot_run_gets_a_row_with_the_reason(console: Console) -> None:
    tries: list[str] = []

    def broken() -> dict[str, float]:
        tries.append("broken")
        if len(tries) > 1:
            raise Unavailable("no such peer")
        return {"s": 1.0}

    found = measure([Variant("good", lambda: {"s": 2.0}), Variant("bad", broken)], 4, title="t", console=console)
    assert len(tries) == 2, "not tried again"
    assert found.missing == {"bad": "no such peer"}
    assert "bad" not in found.samples, "what it measured before is not compared"
    assert found.ratio("bad", "good", "s") is None
    assert {"variant": "bad", "reason": "no such peer", "threads": 1} in found.rows(threads=1)


def test_ratios_are_taken_inside_a_round() -> None:
    """The machine became twice as slow after each round: medians apart would say anything, pairs say 2."""
    found = result(slow=[2.0, 4.0, 8.0], fast=[1.0, 2.0, 4.0])
    pair = found.ratio("slow", "fast", "s")
    assert pair is not None
    assert (pair.median, pair.q1, pair.q3) == (2.0, 2.0, 2.0)
    assert found.ratio("slow", "absent", "s") is None


def test_quartiles_lie_within_what_was_measured() -> None:
    spread = harness.spread([1.0, 3.0])
    assert (spread.q1, spread.median, spread.q3) == (1.5, 2.0, 2.5)
    assert harness.spread([4.0]) == harness.Spread(4.0, 4.0, 4.0)


# --- refusals ---------------------------------------------------------------------------------------------------------


def noisy(**noise: Any) -> Result:
    return dataclasses.replace(result(a=[2.0], b=[1.0]), **noise)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (noisy(probes=[0.01, 0.01, 0.02]), "2.00 times as long"),
        (noisy(busy=[0.0, 0.4, 0.5]), "others kept 40% of the processors busy"),
    ],
)
def test_a_noisy_machine_gets_no_ratios(found: Result, why: str) -> None:
    refused = judged("x", {"a_vs_b": 2.0}, found.rows(), [result(a=[1.0]), found], quick=False)
    assert refused.headline == {}
    assert refused.rows, "what was measured is still told"
    assert not refused.trusted
    assert why in refused.note


def test_one_slow_probe_of_many_is_forgiven() -> None:
    assert noisy(probes=[0.01] * 19 + [0.05]).noise == ""


def test_a_quick_run_is_never_to_be_quoted() -> None:
    quick = judged("x", {"a_vs_b": 2.0, "missing": None}, [], [noisy(busy=[0.9])], quick=True)
    assert quick.headline == {"a_vs_b": 2.0}
    assert not quick.trusted
    assert "a quick run" in quick.note


def test_a_quiet_full_run_is_trusted() -> None:
    found = judged("x", {"a_vs_b": 2.0}, [], [result(a=[2.0], b=[1.0])], quick=False)
    assert (found.trusted, found.note, found.headline) == (True, "", {"a_vs_b": 2.0})


# --- result files -----------------------------------------------------------------------------------------------------


def sample_report(**changes: Any) -> Report:
    found = result(plain=[3.0, 4.0, 5.0], ours=[1.5, 2.0, 2.5])
    found.missing["peer"] = "it is not installed"
    case = {"threads": 1, "pages": "huge"}
    pairs = {"plain_vs_ours": found.ratio("plain", "ours", "s")}
    rows = [*found.rows(**case), *ratio_rows(pairs, **case)]
    values = {"headline": {"plain_vs_ours": 2.0}, "commit": "0123456789ab", "machine": MACHINE, **changes}
    return Report("sample", rows=rows, **values)


def test_the_result_file(golden: Callable[[str, Any], None], tmp_path: Path) -> None:
    sample_report().write(tmp_path / "sample.json")
    golden("function/bench.json", json.loads((tmp_path / "sample.json").read_text()))
    assert report.read(tmp_path / "sample.json") == sample_report()


def test_a_summary_can_be_read_by_people_and_says_all_there_is(tmp_path: Path) -> None:
    """The metrics of one variant in one case are one entry, and no line is too long for a screen."""
    place = tmp_path / "many.json"
    metrics = [f"a metric, whose name has {n} things to say" for n in range(40)]
    rows = [harness.row([1.0, 2.0], variant=name, metric=m, case="x, y") for name in ("a", "b") for m in metrics]
    rows += [rows[0], {"variant": "c", "reason": 'it said "no, "'}, harness.row([1.0], variant="a", metric=metrics[0])]
    many = Report("many", {}, rows, commit="0", machine=MACHINE, note='a note, "quoted", ')
    many.write(place)
    assert report.read(place) == many
    assert place.read_text().count('"metrics"') == 4
    assert max(map(len, place.read_text().splitlines())) < 200


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_summaries(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    report.read(path).write(tmp_path / path.name)
    assert (tmp_path / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_states_its_claim_and_what_it_is_of(name: str, tmp_path: Path) -> None:
    mpl = pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    committed = report.read(tables.RESULTS / f"{name}.json")
    place = tmp_path / f"{name}.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):
        assert plots.draw(committed, place)
    drawn = place.read_text()
    assert f"commit {committed.commit}" in drawn
    assert "to be quoted" not in drawn
    assert re.search(
        {"cold-start": "0.2 s instead of 3.5 s", "density": "Eight replicas", "fanout": "1.3 times"}[name], drawn
    )
    assert (tables.PLOTS / f"{name}.png").stat().st_size < 150_000


@pytest.mark.parametrize("name", plots.PICTURES)
def test_what_measured_nothing_is_drawn_all_the_same(name: str, tmp_path: Path) -> None:
    """A quick run on a machine without root, for one."""
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    rows = [{"variant": "plain x8", "reason": "it is not root"}]
    assert plots.draw(Report(name, {}, rows, trusted=False, note="a quick run"), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_what_is_no_curve_has_no_picture(tmp_path: Path) -> None:
    assert not plots.draw(sample_report(), tmp_path / "sample.png")
    assert not (tmp_path / "sample.png").exists()
    assert {path.stem for path in tables.PLOTS.iterdir()} == plots.PICTURES.keys()


# --- the pages --------------------------------------------------------------------------------------------------------


def test_the_pages_say_what_the_results_say() -> None:
    texts = [page.read_text() for page in tables.PAGES]
    for text in texts:
        assert tables.rendered(text, tables.RESULTS) == text, "run scripts/bench tables"
    text = "".join(texts)
    for name in NAMES:
        assert text.count(f"<!-- bench: {name} -->") == 1, f"one page has a place for {name}"
        plot = tables.PLOTS / f"{name}.png"
        assert (f"({tables.FROM_PAGES}/{name}.png)" in text) == plot.exists(), "run scripts/bench tables"
    for page in tables.PAGES:
        assert (page.parent / tables.FROM_PAGES).resolve() == tables.PLOTS
    assert not [page for page in PAGES if "<!-- bench" in (ROOT / page).read_text() and ROOT / page not in tables.PAGES]


def test_the_first_page_quotes_the_results() -> None:
    quoted = rows((ROOT / "README.md").read_text(), "gain")
    assert len(quoted) > 5
    for *_, without, gained, source in quoted:
        name, *keys = re.findall(r"`([^`]*)`", source)
        headline = report.read(tables.RESULTS / f"{name}.json").headline
        figures = [cell.partition(" ")[0] for cell in (without, gained)]
        assert figures[-len(keys) :] == [tables._number(headline[key]) for key in keys], source


PLACES = [("sample", "| stale | 9 |\n"), ("load", "")]


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables._SHAPES, "sample", tables.Shape({"seconds": "s"}, {"threads": 1}))
    sample_report().write(tmp_path / "sample.json")
    sample, other = ("<!-- bench: {} -->\n{}<!-- bench: end -->\n".format(*place) for place in PLACES)
    text = f"before\n{sample}after\n{other}"
    filled = tables.rendered(text, tmp_path)
    assert "| variant | seconds |\n|---|---:|\n| plain | 4 |\n| ours | 2 |\n" in filled
    assert "| plain_vs_ours | 2 | 2 … 2 |" in filled
    assert "- peer: it is not installed" in filled
    assert "Commit 0123456789ab; 2 × CPU" in filled
    assert "stale" not in filled
    assert "Not measured on a quiet machine yet: `scripts/bench load`." in filled
    assert tables.rendered(filled, tmp_path) == filled


@pytest.mark.parametrize("changes", [{"trusted": False, "note": "a quick run"}, {"commit": "0123456789ab+"}])
def test_figures_that_must_not_be_quoted_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    sample_report(**changes).write(tmp_path / "sample.json")
    with pytest.raises(ValueError, match="not to be quoted"):
        tables.rendered("<!-- bench: sample -->\n<!-- bench: end -->\n", tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Report], None]:
    """Make `fake(report)` the result of the benchmark `load`."""

    def install(found: Report) -> None:
        module = ModuleType("benchmarks.load")
        module.run = lambda quick, console: found  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "benchmarks.load", module)
        monkeypatch.setattr(bench.signal, "signal", lambda *_: None)

    return install


def test_a_result_is_shown_and_written(fake: Callable[[Report], None], tmp_path: Path) -> None:
    fake(sample_report())
    done = CliRunner().invoke(bench.main, ["load", "--json", str(tmp_path / "deep" / "load.json")])
    assert done.exit_code == 0, done.output
    assert "plain_vs_ours" in done.output
    assert report.read(tmp_path / "deep" / "load.json") == sample_report()


def test_noise_has_an_exit_code_of_its_own(fake: Callable[[Report], None]) -> None:
    fake(sample_report(headline={}, trusted=False, note="too noisy to compare"))
    done = CliRunner().invoke(bench.main, ["load"])
    assert done.exit_code == 3
    assert "too noisy to compare" in done.output
    assert CliRunner().invoke(bench.main, ["load", "--quick"]).exit_code == 0, "a quick run compares nothing"


def test_every_benchmark_is_there() -> None:
    assert all((ROOT / "scripts" / "benchmarks" / f"{module(name)}.py").exists() for name in NAMES)
    assert CliRunner().invoke(bench.main, ["nothing"]).exit_code == 2


# --- the machine ------------------------------------------------------------------------------------------------------


def test_files_are_dropped_from_the_page_cache_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    machine.warm([file])
    assert machine.cached(file) == 1 << 20
    machine.drop([file])
    if machine.cached(file) != 0:
        pytest.skip("this file system lives in memory")
    machine.warm([file])
    assert machine.cached(file) == 1 << 20
    (tmp_path / "empty").touch()
    assert machine.cached(tmp_path / "empty") == 0


HOLD = """
import signal, sys, time
sys.path.append("scripts")
from benchmarks import machine
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with machine.huge_pages(8 << 20) as got:
    print(got, flush=True)
    time.sleep(60)
"""


def test_the_pool_of_huge_pages_is_given_back_also_on_sigterm(huge_pages: Callable[[int], None]) -> None:
    """The fixture holds the lock that keeps others away, so the benchmark's own is taken out of the way."""
    huge_pages(0)
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("with machine", "machine.fcntl.flock = lambda *_: None\nwith machine")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        got = int(process.stdout.readline())
        if got:
            assert int(pool.read_text()) > int(before)
    finally:
        process.terminate()
        process.wait(30)
    assert pool.read_text() == before
