"""Loads of a 1.1 B model from this machine's disk: each way in a fresh process, from its imports to one token.

A cold variant finds nothing of the checkpoint in the page cache. `attach` finds the weights in the agent's memory, `ssd
cold` an agent that has their image on SSD, `agent cold` one that has to read the checkpoint itself. The prompt is one
token.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

from report import Report, Row
from rich.console import Console

from benchmarks import children, machine, models
from benchmarks.agents import Running, agent
from benchmarks.harness import Result, Sample, Spread, Unavailable, Variant, judged, measure, middle, ratio_rows

NAME = "load"
_QUEUE = 16  # reads in flight: the agent's --readers, and raw reads
_CHUNK = 8 << 20
_SSD = models.PLACE / "ssd"


def run(quick: bool, console: Console) -> Report:
    rounds = 2 if quick else 5
    place = models.checkpoint("125m" if quick else "1.1b", console)
    results: list[Result] = []
    headline: dict[str, float | None] = {}
    rows: list[Row] = []
    # The headline's case comes first; the others show what thread count and page kind change.
    for threads, pages in ((1, "huge"),) if quick else ((1, "huge"), (2, "huge"), (1, "4k")):
        case: dict[str, str | float] = {"pages": pages, "threads": threads, "prompt_tokens": 1}
        # Room for the model of each of two agents, and for the buffer of raw reads.
        needed = int(models.weight_bytes(place) * 2.04) + _QUEUE * _CHUNK
        with machine.huge_pages(needed if pages == "huge" else 0) as pool:
            if pages == "huge" and not pool:
                rows.append({"variant": "(all)", "reason": "this machine has no pool of huge pages for us", **case})
                continue
            result = _case(place, threads, pages, min(rounds, 3) if results else rounds, console, whole=not results)
        pairs = _ratios(result)
        suffix = "" if not results else f"_{threads}t_{pages}"
        headline |= {key + suffix: middle(pair) for key, pair in pairs.items()}
        rows += [*result.rows(**case), *ratio_rows(pairs, **case)]
        results.append(result)
    growth = _growth(quick, console)
    pairs = {"attach_growth": growth.ratio("attach large", "attach small", "load_s")}
    headline |= {key: middle(pair) for key, pair in pairs.items()}
    rows += [*growth.rows(), *ratio_rows(pairs)]
    return judged(NAME, headline, rows, [*results, growth], quick)


def _case(place: Path, threads: int, pages: str, rounds: int, console: Console, *, whole: bool) -> Result:
    options = ["--huge-pages", "always" if pages == "huge" else "never", "--dram", str(models.weight_bytes(place) * 2)]
    options += ["--readers", str(_QUEUE)]
    shutil.rmtree(_SSD, ignore_errors=True)
    try:
        with agent(*options) as running, agent(*options, "--ssd", str(_SSD)) as keeper:
            variants = _variants(place, running, keeper, threads, whole=whole)
            return measure(variants, rounds, title=f"load, {pages} pages, {threads} threads", console=console)
    finally:
        shutil.rmtree(_SSD, ignore_errors=True)


def _variants(place: Path, running: Running, keeper: Running, threads: int, *, whole: bool) -> list[Variant]:
    """Return all variants, or those that depend on threads and pages; `keeper` is the agent with an SSD tier."""
    uri = f"file://{place}"
    serialised = place.with_name(place.name + "-tensorizer") / "model.tensors"

    def cold() -> None:
        running.settle()
        machine.drop([*models.files(place), *([serialised] if serialised.exists() else ())])
        if (left := sum(map(machine.cached, models.weight_files(place)))) > models.weight_bytes(place) // 100:
            raise Unavailable(f"{left / 1e6:.0f} MB of the checkpoint stay in the page cache: somebody maps it")

    def warm() -> None:
        running.settle()
        machine.warm([*models.weight_files(place), *([serialised] if serialised.exists() else ())])

    def absent() -> None:
        running.settle()
        running.forget(uri)
        cold()

    def on_ssd() -> None:
        running.settle()
        keeper.store(uri)
        keeper.forget(uri)
        cold()

    def ours(which: Running) -> Callable[[], Sample]:
        def run() -> Sample:
            before = which.cpu_seconds()
            sample = children.run("glowplug", {"socket": str(which.socket), "uri": uri}, threads=threads)
            return {
                **sample,
                "cpu_s": sample["cpu_s"] + which.cpu_seconds() - before,
            }  # the agent's time counts, too

        return run

    def read() -> Sample:
        before, start = keeper.cpu_seconds(), perf_counter()
        with keeper.client.lease(uri) as lease:
            lease.wait_ready(time.monotonic() + children.LIMIT_SECONDS)
            seconds = perf_counter() - start
        return {"load_s": seconds, "mb_s": _image_bytes() / 1e6 / seconds, "cpu_s": keeper.cpu_seconds() - before}

    def theirs(way: str) -> Callable[[], Sample]:
        return lambda: children.run(way, {"place": str(place), "tensors": str(serialised)}, threads=threads)

    def with_file(prepare: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            _serialise(place, serialised)
            prepare()

        return both

    found = []
    for way in ("from_pretrained", "mmap_assign"):
        name = way.replace("_assign", " + assign")
        found += [Variant(f"{name} cold", theirs(way), cold), Variant(f"{name} warm", theirs(way), warm)]
    for peer in children.PEERS if whole else ():
        prepares = [with_file(cold), with_file(warm)] if peer == "tensorizer" else [cold, warm]
        found += [
            Variant(f"{peer} {state}", theirs(peer), prepare)
            for state, prepare in zip(("cold", "warm"), prepares, strict=True)
        ]
    if whole:
        found.append(Variant("raw O_DIRECT read", lambda: _raw_read(_segments()), on_ssd))
        found.append(Variant("glowplug ssd read", read, on_ssd))
    return [
        *found,
        Variant("glowplug agent cold", ours(running), absent),
        Variant("glowplug ssd cold", ours(keeper), on_ssd),
        Variant("glowplug attach", ours(running), lambda: running.hold(uri)),
    ]


def _ratios(result: Result) -> dict[str, Spread | None]:
    """Return the ratios of from_pretrained's time to each variant's, until the first forward is done."""
    return {
        "agent_cold_vs_from_pretrained_cold": result.ratio("from_pretrained cold", "glowplug agent cold", "first_s"),
        "ssd_cold_vs_from_pretrained_cold": result.ratio("from_pretrained cold", "glowplug ssd cold", "first_s"),
        "ssd_read_vs_raw": result.ratio("raw O_DIRECT read", "glowplug ssd read", "load_s"),
        "attach_vs_from_pretrained_cold": result.ratio("from_pretrained cold", "glowplug attach", "first_s"),
        "attach_vs_from_pretrained_warm": result.ratio("from_pretrained warm", "glowplug attach", "first_s"),
    }


def _serialise(place: Path, target: Path) -> None:
    """Write the checkpoint in tensorizer's own format, as its users do once."""
    if target.exists():
        return
    try:
        from tensorizer import TensorSerializer
    except ImportError as error:
        raise Unavailable(f"tensorizer cannot be imported: {error}") from error
    from transformers import AutoModelForCausalLM

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    serializer = TensorSerializer(str(unfinished))
    serializer.write_module(AutoModelForCausalLM.from_pretrained(place, dtype="auto"))
    serializer.close()
    unfinished.rename(target)


def _segments() -> list[Path]:
    """Return the segment files of the one image that the agent with the SSD tier has."""
    return sorted(_SSD.glob("images/*/*.seg"))


def _image_bytes() -> int:
    return sum(segment.stat().st_size for segment in _segments())


def _raw_read(files: list[Path]) -> Sample:
    """Measure the disk: O_DIRECT into one reused buffer of huge pages, as many reads in flight as an agent has."""
    buffer = machine.hugetlb_buffer(_QUEUE * _CHUNK)
    if buffer is None:
        raise Unavailable("no huge pages are left for its buffer")
    view = memoryview(buffer)
    targets = [view[n * _CHUNK : (n + 1) * _CHUNK] for n in range(_QUEUE)]
    fds = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
    work = [(fd, at) for fd in fds for at in range(0, os.fstat(fd).st_size, _CHUNK)]

    def reader(number: int) -> int:
        return sum(os.preadv(fd, [targets[number]], at) for fd, at in work[number::_QUEUE])

    start = perf_counter()
    try:
        with ThreadPoolExecutor(_QUEUE) as pool:
            total = sum(pool.map(reader, range(_QUEUE)))
    finally:
        for fd in fds:
            os.close(fd)
    seconds = perf_counter() - start
    if total != sum(file.stat().st_size for file in files):
        raise Unavailable("this file system cuts direct reads short")
    for target in targets:
        target.release()
    view.release()
    buffer.close()
    return {"load_s": seconds, "mb_s": total / 1e6 / seconds}


def _growth(quick: bool, console: Console) -> Result:
    """Measure lease, map and views of two models of equally many tensors: the time should not follow the bytes."""
    small, large = (0.25, 1.0) if quick else (2.0, 8.0)
    places = {"attach small": models.zeros(small, console), "attach large": models.zeros(large, console)}
    with agent("--huge-pages", "never", "--dram", str(int((small + large) * 1.1e9))) as running:
        for place in places.values():
            running.hold(f"file://{place}")
            machine.drop(models.files(place))  # reading the holes has filled the page cache with zeros

        def attach(place: Path) -> Callable[[], Sample]:
            return lambda: children.run("attach", {"socket": str(running.socket), "uri": f"file://{place}"})

        variants = [Variant(name, attach(place)) for name, place in places.items()]
        return measure(variants, 3 if quick else 5, title="attach growth", console=console)
