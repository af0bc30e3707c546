"""`scripts/simulate keepalive`: worked examples of both mechanisms and of each rule, and what must hold in any run."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.policy import keepalive
from cache_agent.policy.keepalive import LayerCost

SCRIPTS = Path(__file__).parents[2] / "scripts"
MB, GB = 10**6, 10**9
BARE, LANG = LayerCost("bare", 1.0, 100 * MB), LayerCost("lang:py", 2.0, 200 * MB)
USERS = [LayerCost(f"user:{name}", 4.0, 300 * MB) for name in "AB"]
NEVER = math.inf
layers = st.builds(LayerCost, st.just("lang"), st.floats(0.001, 1e3), st.integers(10**6, 10**12))
prices = st.floats(0.001, 1e4)


@pytest.fixture(scope="module")
def sim() -> Iterator[Any]:
    """Its modules; they lie beside the launcher, not in a package."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        from simulations import functions, rules, worlds
        from simulations import keepalive as comparison

        yield SimpleNamespace(functions=functions, rules=rules, worlds=worlds, comparison=comparison)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def two(sim: Any) -> Any:
    """Two functions of one language."""
    return tuple(sim.functions.Function(user.name[-1], (BARE, LANG, user), 1.0) for user in USERS)


def calls(sim: Any, *at: tuple[float, int]) -> Any:
    return [sim.functions.Call(when, function, 1.0) for when, function in at]


def holding(sim: Any, **seconds: float) -> Any:
    """A rule that holds each kind of layer for a fixed time."""

    class Holding(sim.worlds.Rule):
        def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Any:
            return sim.worlds.Hold(seconds[layer.name.partition(":")[0]])

    return Holding()


def run(world: Any, functions: Any, rule: Any, trace: Any) -> Any:
    """The world after its last event, too."""
    made = world(functions, rule)
    made.run(trace)
    while made._events:
        made._step()
    return made


def test_containers_are_used_up_and_taken_down_layer_by_layer(sim: Any, two: Any) -> None:
    rule = holding(sim, user=10.0, lang=10.0, bare=10.0)
    trace = calls(sim, (0, 0), (9, 0), (15, 1), (50, 0), (50, 0))
    world = run(sim.worlds.Containers, two, rule, trace)
    # Cold, A's own, cold since A's runs to 10 and is not at lang before 20, and twice a container at bare (of A, from
    # 30 to 40; of B, from 43 to 53): one is left of them.
    assert world.result.starts == [7.0, 0.0, 7.0, 6.0, 7.0]
    assert dict(world.result.found) == {"cold": 3, "user": 1, "bare": 1}


def test_idle_memory_of_containers(sim: Any, two: Any) -> None:
    world = sim.worlds.Containers(two, holding(sim, user=10.0, lang=5.0, bare=2.0))
    result = world.run(calls(sim, (0, 0), (100, 0)))
    # From 8 s on: 10 s of all three layers, 5 s of two, 2 s of one.
    assert result.idle == pytest.approx(10 * 0.6 + 5 * 0.3 + 2 * 0.1)


def test_zygotes_are_forked_by_everybody(sim: Any, two: Any) -> None:
    rule = holding(sim, user=0.0, lang=100.0, bare=0.0)
    world = run(sim.worlds.Zygotes, two, rule, calls(sim, (0, 0), (1, 0), (20, 1), (20, 1), (300, 0)))
    fork = sim.worlds.FORK
    # The second waits for what the first builds; of the two at 20 s one builds B's layer and both use it.
    assert world.result.starts == pytest.approx([7 + fork, 6 + fork, 4 + fork, 4 + fork, 7 + fork])
    assert dict(world.result.found) == {"cold": 2, "user": 2, "lang": 1}


def test_idle_memory_of_zygotes(sim: Any, two: Any) -> None:
    rule = holding(sim, user=10.0, lang=5.0, bare=2.0)
    result = sim.worlds.Zygotes(two, rule).run(calls(sim, (0, 0), (100, 0)))
    bare, lang, user = 0.1, 0.2 + 0.01, 0.3 + 0.031  # each has a tenth of what lies below as pages of its own
    assert result.idle == pytest.approx(10 * (bare + lang + user) + 5 * (bare + lang) + 2 * bare)
    # While B runs, the shared layers work: only A's own idles.
    world = sim.worlds.Zygotes(two, holding(sim, user=1e6, lang=1e6, bare=1e6))
    result = world.run([*calls(sim, (0, 0)), sim.functions.Call(8.02, 1, 100.0), *calls(sim, (50, 0))])
    assert result.idle == pytest.approx((50 - 8.02) * user, rel=1e-6)


def test_a_layer_is_built_ahead(sim: Any, two: Any) -> None:
    class Ahead(sim.worlds.Rule):
        def idle(self, layer: LayerCost, below: Sequence[LayerCost], alone: int, now: float) -> Any:
            return sim.worlds.Hold(0.0, 50.0, 70.0) if layer.name.startswith("user") else sim.worlds.Hold(0.0)

    trace = calls(sim, (0, 0), (70, 0), (300, 0))
    for world in (sim.worlds.Zygotes, sim.worlds.Containers):
        made = run(world, two, Ahead(), trace)
        fork = sim.worlds.FORK if world is sim.worlds.Zygotes else 0.0
        assert made.result.starts == pytest.approx([7 + fork, fork, 7 + fork]), world


@pytest.mark.parametrize("seed", range(3))
def test_books_are_kept(sim: Any, seed: int) -> None:
    """Each call is served once and no sooner than possible; memory and counts agree with what is there."""
    work = sim.functions.shortened(sim.functions.synthetic(), 0.03)
    trace = work.calls(seed)
    for variant in sim.comparison.VARIANTS:
        made = run(variant.world, work.functions, variant.make(2.0, work, trace), trace)
        result = made.result
        assert len(result.starts) == sum(result.found.values()) == len(trace), variant.name
        assert min(result.starts) >= 0
        assert result.idle >= 0
        longest = max(sum(layer.seconds for layer in function.layers) for function in work.functions)
        assert max(result.starts) <= longest + sim.worlds.FORK + 1e-9, variant.name
        if variant.world is sim.worlds.Zygotes:
            zygotes = {zygote.layer.name: zygote for path in made._paths for zygote in path}.values()
            assert made._idle_bytes == sum(zygote.layer.bytes for zygote in zygotes if zygote.present)
            for zygote in zygotes:
                above = [z for z in zygotes if z.present and z.below[:1] == (zygote,)]
                assert (zygote.running, zygote.children) == (0, len(above))
                assert zygote.present or not above, "nothing stands on what is not there"
        else:
            pools = [container for pool in made._idle.values() for container in pool]
            assert made._idle_bytes == made._total == sum(container.bytes for container in pools), variant.name


def test_faascache_stays_within_its_memory(sim: Any, two: Any) -> None:
    rule = sim.rules.FaasCache(1.3 * GB)  # two containers
    source = random.Random(1)
    world = sim.worlds.Containers(two, rule)
    for number in range(200):
        world.run(calls(sim, (100.0 * number, source.randrange(2))))
        assert world._total <= 1.3 * GB
    assert world.result.found["user"] > 0


def test_faascache_lets_go_of_what_is_cheap(sim: Any) -> None:
    functions = [
        sim.functions.Function(name, (BARE, LANG, LayerCost(f"user:{name}", seconds, 300 * MB)), 1.0)
        for name, seconds in (("dear", 40.0), ("cheap", 1.0), ("third", 5.0))
    ]
    rule = sim.rules.FaasCache(1.3 * GB)
    world = sim.worlds.Containers(functions, rule)
    world.run(calls(sim, (0, 0), (100, 1), (200, 2), (300, 0)))
    assert world.result.starts[-1] == 0.0


def test_rainbowcakes_rule(sim: Any, two: Any) -> None:
    rule = sim.rules.RainbowCake()
    assert rule.idle.__func__ is not sim.worlds.Rule.idle
    for second in range(0, 60, 10):
        rule.arrive(two[0], float(second))
    # Six arrivals in 50 s, seen at 60: a mean of 10 s; -10 · ln 0.2 = 16.1 s.
    assert rule.idle(USERS[0], [LANG, BARE], 2, 60.0).hold == pytest.approx(0.249 * 4 / 0.3)  # β = 3.3 s is less
    slow = LayerCost("user:A", 400.0, 300 * MB)
    assert rule.idle(slow, [LANG, BARE], 2, 60.0).hold == pytest.approx(16.094, abs=1e-3)
    code = sim.rules.RainbowCake(code=True)
    code.arrive(two[0], 0.0)
    assert code.idle(slow, [LANG, BARE], 2, 10.0).hold == 60.0, "a minute at least, and β = 166 s of the container"
    assert code.idle(USERS[0], [LANG, BARE], 2, 10.0).hold == 2.0, "0.249 · 4 s / 0.6 GB, rounded up"


def test_histogram_unloads_and_comes_back(sim: Any) -> None:
    rule = sim.rules.Histogram()
    user = USERS[0]
    assert rule.idle(user, [], 0, 0.0).hold == 4 * 3600, "nothing known: its whole range"
    now = 0.0
    for _ in range(30):
        now += 15 * 60 + 1
        rule.reach(user, now)
        plan = rule.idle(user, [], 0, now)
    assert plan.hold == 0.0
    assert plan.rebuild == pytest.approx(15 * 60 * 0.9)
    assert plan.until == pytest.approx(16 * 60 * 1.1)
    for _ in range(100):
        now += 5.0
        rule.reach(user, now)
        plan = rule.idle(user, [], 0, now)
    assert (plan.hold, plan.rebuild) == (pytest.approx(16 * 60 * 1.1), NEVER)


def test_pagurus_lends_to_functions_of_the_language(sim: Any, two: Any) -> None:
    world = run(sim.worlds.Containers, two, sim.rules.Pagurus(), calls(sim, (0, 0), (50, 1), (50, 1)))
    assert world.result.starts == pytest.approx([7.0, 0.4, 7.0])


def test_runs_the_shipped_rule(sim: Any, two: Any) -> None:
    rule = sim.rules.Priced(6.0)
    for number in range(10):
        rule.idle(USERS[0], [LANG, BARE], 0, 10.0 * number)
        rule.reach(USERS[0], 10.0 * number + 5.0)
    assert rule.idle(USERS[0], [LANG, BARE], 0, 100.0) == (keepalive.keep(USERS[0], [5.0] * 10, 6.0).hold, NEVER, NEVER)
    stack = sim.rules.pooled([USERS[0], LANG, BARE])
    assert rule.idle(USERS[0], [LANG, BARE], 2, 100.0) == (keepalive.keep(stack, [5.0] * 10, 6.0).hold, NEVER, NEVER)


@given(st.lists(layers, min_size=1, max_size=4), prices, st.floats(0.001, 1e6))
def test_pooled_layers_are_held_as_long_as_the_whole_stack_is_worth_it(
    sim: Any, stack: list[LayerCost], rho: float, gap: float
) -> None:
    """Against all that can be held through a gap: any number of layers, from the bottom up."""

    def cost(dropped: int) -> float:
        held = sum(layer.bytes for layer in stack[dropped:]) / GB * gap
        return held + rho * sum(layer.seconds for layer in stack[:dropped])

    one = sim.rules.pooled(stack)
    margin = cost(0) - min(cost(dropped) for dropped in range(1, len(stack) + 1))
    if abs(margin) > 1e-9 * cost(0):
        assert (gap < keepalive.beta(one, rho)) == (margin < 0)
    assert one.name == stack[0].name
    assert keepalive.beta(one, rho) <= keepalive.beta(stack[0], rho)


def test_pooled(sim: Any) -> None:
    user, lang, bare = LayerCost("user", 1.8, 55), LayerCost("lang", 0.4, 128), LayerCost("bare", 0.4, 22)
    assert sim.rules.pooled([user]) == user
    assert sim.rules.pooled([user, lang, bare]) == LayerCost("user", 2.2, 183), (
        "bare is worth more than what stands on it"
    )
    assert sim.rules.pooled([lang, bare]) == lang


@pytest.mark.parametrize("rho", [0.25, 4.0])
def test_knowing_the_future_helps(sim: Any, rho: float) -> None:
    comparison = sim.comparison
    work = sim.functions.shortened(sim.functions.synthetic(), 0.1)
    trace = work.calls(1)
    samples = {
        v.name: comparison.measure(work, v, rho, trace) for v in comparison.VARIANTS if v.rhos == comparison.RHOS
    }
    costs = {name: comparison.cost(sample, rho) for name, sample in samples.items()}
    assert costs[comparison.BOUND] == min(costs.values())
    assert costs["glowplug"] < costs["rainbowcake by ρ, zygotes"] < costs["rainbowcake by ρ"]


def test_a_seed_gives_the_same_calls_and_another_one_others(sim: Any) -> None:
    work = sim.functions.synthetic()
    assert work.calls(3) == work.calls(3) != work.calls(4)
    assert len(work.calls(3)) == pytest.approx(28_800, rel=0.01)
    assert work.calls(3) == sorted(work.calls(3))


def test_reads_arrivals_per_minute(sim: Any, tmp_path: Path) -> None:
    curve = tmp_path / "arrivals.csv"
    curve.write_text("minute,arrivals\n0,3\n1,0\n2,5\n")
    table = tmp_path / "functions.csv"
    heading = "function,language,bare_ms,lang_ms,user_ms,end_ms,bare_mb,lang_mb,user_mb"
    table.write_text(f"{heading}\nAC,js,300,400,1800,4500,20,128,55\nDV,python,340,640,320,2300,30,55,71\n")
    (work,) = sim.functions.load(curve)
    first, second = work.functions
    assert first.layers == (
        LayerCost("bare", pytest.approx(0.32), 25 * MB),
        LayerCost("lang:js", 0.4, 128 * MB),
        LayerCost("user:AC", 1.8, 55 * MB),
    )
    assert second.layers[0] == first.layers[0]
    assert first.seconds == pytest.approx(2.0)
    at = [int(call.at // 60) for call in work.calls(0)]
    assert (at.count(0), at.count(1), at.count(2)) == (3, 0, 5)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="neither"):
        sim.functions.load(tmp_path / "other.csv")


def test_plots(sim: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    from report import Report
    from simulations import placement, plots, trace

    report = sim.comparison.run(None, seeds=1, quick=True)
    plots.keepalive(report, tmp_path / "keepalive.png")
    rows = placement.compare(trace.synthetic(100, hours=0.01), seeds=2, speed=1.0)
    plots.placement(Report("placement", {}, rows), tmp_path / "placement.svg")
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_size > 10_000} == {
        "keepalive.png",
        "placement.svg",
    }


def test_command(sim: Any, tmp_path: Path) -> None:
    import report

    trace = tmp_path / "azure.csv"
    source = random.Random(1)
    rows = [f"2023-11-16 18:{m:02}:{s:02}.5,{source.randrange(4000)},20" for m in range(20) for s in range(0, 60, 10)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    result = tmp_path / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, str(SCRIPTS / "simulate.py"), "keepalive", "--seeds", "2", "--trace", str(trace)]
    done = subprocess.run(
        [*command, "--json", str(result)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "rainbowcake, zygotes" in done.stdout
    written = report.read(result)
    assert (written.name, written.trusted) == ("keepalive", True)
    assert {"idle_memory_vs_rainbowcake", "cost_vs_best_baseline", "published_order_of_waste_kept"} <= set(
        written.headline
    )
    figures = {
        row["metric"]: row["median"] for row in written.rows if row["variant"] == "openwhisk" and "rho" not in row
    }
    assert figures["calls"] == len(rows)
    assert figures.keys() == {"idle_gb_s", "mean_start_s", "p50_start_s", "p99_start_s", "calls"}
    done = subprocess.run([*command[:-1], str(result)], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, "neither arrivals per minute" in done.stderr) == (1, True)
