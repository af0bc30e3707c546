"""Cold starts, from the execution of a container's entrypoint to its first token: a plain function, and ours.

All variants are the same function with the same 32-token prompt and one token of answer, as many threads as the machine
has processors. `warm` and `cold` are the state of the page cache, libraries included. `warm token` is the time of the
same worker's next first token: no cold start can be shorter.

`pod` is a function whose container runs, and whose idle worker was dropped to a layer: from the request to its first
token. `node` is a container's first start, forked by a pool from this layer; `fork_join_ms` is the time of that fork
and of entering cgroup and container, `charged_mb` the charge of the container's memory cgroup after its first answer.
`node, spare` is a container whose idle worker was dropped, and in which a spare process has waited for a second.

`kept_…` and `fresh_…` are the times to the first byte of a started function's answers that ask no model, on one
connection and on one for each. The agent's memory is of huge pages where a pool of them can be reserved: a fresh
process enters 4 KiB pages one by one in its first forward pass.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from report import Report, Row
from rich.console import Console

from benchmarks import containers, functions, machine, models, nodes
from benchmarks.agents import Running, agent
from benchmarks.functions import Function
from benchmarks.harness import Result, Sample, Unavailable, Variant, judged, measure, middle, ratio_rows

NAME = "cold-start"
_WARM_TOKENS = 5


def run(quick: bool, console: Console) -> Report:
    threads = len(os.sched_getaffinity(0))
    headline: dict[str, float | None] = {}
    rows: list[Row] = []
    results = []
    for size, rounds in (("125m", 2),) if quick else (("125m", 5), ("1.1b", 3)):
        place = models.checkpoint("125m" if size == "125m" else "1.1b", console)
        case: dict[str, str | float] = {
            "model": size,
            "threads": threads,
            "shim": functions.shim_of_nodes(),
            "prompt_tokens": functions.PROMPT_TOKENS,
            "namespaces": "own" if containers.NAMESPACES else "none",
        }
        size_in_memory = models.weight_bytes(place)
        with (
            machine.huge_pages(int(size_in_memory * 1.02)),
            agent("--huge-pages", "auto", "--dram", str(size_in_memory * 2)) as running,
        ):
            running.hold(f"file://{place}")
            title = f"cold start, {size}"
            result = measure(_variants(place, running, threads), rounds, title=title, console=console)
            page = running.client.status().models[0].page
        results.append(result)
        suffix = "" if size == "125m" else f"_{size}"
        pairs = {
            f"lean_cold_vs_plain{suffix}": result.ratio("glowplug agent, warm", "plain, warm", "first_token_ms"),
            f"lean_cold_vs_plain_cold_cache{suffix}": result.ratio(
                "glowplug agent, cold", "plain, cold", "first_token_ms"
            ),
            f"pod_lang_vs_warm_worker{suffix}": result.ratio(
                "glowplug pod, lang", "glowplug pod, lang", "first_token_ms", "warm_token_ms"
            ),
            f"pod_model_vs_warm_worker{suffix}": result.ratio(
                "glowplug pod, model", "glowplug pod, model", "first_token_ms", "warm_token_ms"
            ),
            f"first_token_vs_warm_worker{suffix}": result.ratio(
                "glowplug node, model", "glowplug node, model", "first_token_ms", "warm_token_ms"
            ),
            f"node_spare_vs_warm_worker{suffix}": result.ratio(
                "glowplug node, spare", "glowplug node, spare", "first_token_ms", "warm_token_ms"
            ),
            **{
                f"ready_speedup_{layer}{suffix}": result.ratio(
                    "plain, warm", f"glowplug node, {layer}", "http_ready_ms"
                )
                for layer in ("lang", "model")
            },
            f"node_lang_vs_plain{suffix}": result.ratio("glowplug node, lang", "plain, warm", "first_token_ms"),
            f"node_lang_vs_warm_worker{suffix}": result.ratio(
                "glowplug node, lang", "glowplug node, lang", "first_token_ms", "warm_token_ms"
            ),
            **{
                f"kept_vs_fresh_{answer}{suffix}": result.ratio(
                    "glowplug agent, warm", "glowplug agent, warm", f"kept_{answer}_ms", f"fresh_{answer}_ms"
                )
                for answer in functions.WITHOUT_MODEL
            },
            f"private_cold_vs_plain{suffix}": result.ratio("glowplug private, warm", "plain, warm", "first_token_ms"),
        }
        headline |= {key: middle(pair) for key, pair in pairs.items()} | _absolute(result, suffix)
        case["pages"] = "2 MiB" if page >= 2 << 20 else f"{page >> 10} KiB"
        rows += [*result.rows(**case), *ratio_rows(pairs, **case)]
    return judged(NAME, headline, rows, results, quick)


def _variants(place: Path, running: Running, threads: int) -> list[Variant]:
    uri = f"file://{place}"
    starts: dict[str, Callable[[], AbstractContextManager[Function]]] = {
        "plain": lambda: functions.plain(place, threads=threads),
        "glowplug agent": lambda: functions.glowplug(uri, agent=running.socket, threads=threads),
        "glowplug private": lambda: functions.glowplug(uri, agent=None, threads=threads),
    }

    def warm(start: Callable[[], AbstractContextManager[Function]]) -> Callable[[], None]:
        def prepare() -> None:
            machine.warm(models.weight_files(place))
            with start():  # so that its libraries are in the page cache again
                pass

        return prepare

    def cold() -> None:
        if not machine.drop_everything():
            raise Unavailable("dropping the page cache takes root")

    pods = {
        layer: lambda layer=layer: functions.standby(uri, agent=running.socket, threads=threads, layer=layer)
        for layer in ("lang", "model")
    }
    return [
        *(
            Variant(f"{name}, {cache}", lambda name=name, start=start: _start(name, start), prepare)  # type: ignore[misc]
            for name, start in starts.items()
            for cache, prepare in (("warm", warm(start)), ("cold", cold))
        ),
        *(
            Variant(f"glowplug node, {layer}", lambda layer=layer: _place(uri, running, threads, layer))  # type: ignore[misc]
            for layer in ("lang", "model")
        ),
        Variant("glowplug node, spare", lambda: _wake(lambda: _spare(uri, running, threads))),
        *(Variant(f"glowplug pod, {layer}", lambda start=start: _wake(start)) for layer, start in pods.items()),  # type: ignore[misc]
    ]


def _start(name: str, start: Callable[[], AbstractContextManager[Function]]) -> Sample:
    with start() as function:
        sample = {
            "first_token_ms": function.first_token,
            "http_ready_ms": function.http_ready,
            "warm_token_ms": statistics.median(function.ask() for _ in range(_WARM_TOKENS)),
        }
        if name == "glowplug agent":
            sample |= function.connections()
        return {**sample, **function.phases()}


def _place(model: str, running: Running, threads: int, layer: nodes.Layer) -> Sample:
    with nodes.node(model, agent=running.socket, threads=threads, layer=layer) as node, node.start() as function:
        charged = node.cgroup.usage() / 1e6
        sample = {
            "first_token_ms": function.first_token,
            "http_ready_ms": function.http_ready,
            "warm_token_ms": statistics.median(function.ask() for _ in range(_WARM_TOKENS)),
            "charged_mb": charged,
        }
        return {**sample, **node.joined(function)}


@contextmanager
def _spare(model: str, running: Running, threads: int) -> Iterator[Function]:
    with (
        nodes.node(model, agent=running.socket, threads=threads, layer="model") as node,
        node.standby() as function,
    ):
        yield function


def _wake(start: Callable[[], AbstractContextManager[Function]]) -> Sample:
    with start() as function:
        first = function.ask()
        warm = statistics.median(function.ask() for _ in range(_WARM_TOKENS))
        return {"first_token_ms": first, "warm_token_ms": warm, **function.phases()}


def _absolute(result: Result, suffix: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for variant in ("plain, warm", "plain, cold", "glowplug agent, warm", "glowplug agent, cold"):
        key = variant.replace(", ", "_").replace(" ", "_") + suffix
        for metric in ("first_token_ms", "http_ready_ms"):
            found[f"{metric}_{key}"] = result.median(variant, metric)
    for metric in ("fork_join_ms", "charged_mb"):
        found[f"{metric}{suffix}"] = result.median("glowplug node, model", metric)
    for layer in ("lang", "model"):
        for metric in ("fork_join_ms", "charged_mb", "first_token_ms", "http_ready_ms"):
            found[f"node_{layer}_{metric}{suffix}"] = result.median(f"glowplug node, {layer}", metric)
    for answer in functions.WITHOUT_MODEL:
        for connection in ("kept", "fresh"):
            metric = f"{connection}_{answer}_ms"
            found[f"{metric}{suffix}"] = result.median("glowplug agent, warm", metric)
    found[f"node_spare_ms{suffix}"] = result.median("glowplug node, spare", "first_token_ms")
    found[f"pod_rewarm_ms{suffix}"] = result.median("glowplug pod, lang", "first_token_ms")
    found[f"pod_rewarm_model_ms{suffix}"] = result.median("glowplug pod, model", "first_token_ms")
    found[f"warm_worker_first_token_ms{suffix}"] = result.median("glowplug agent, warm", "warm_token_ms")
    return found
