"""Loads from S3, to memory and to a model that has run its first token. The server is real, on loopback.

The server's processor time is not counted, but it competes with every variant for this machine's processors. Its files
are in the page cache. Child processes have done their imports; the prompt is one token.
"""

from __future__ import annotations

import http.client
import mmap
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

from report import Report
from rich.console import Console

from benchmarks import children, machine, models
from benchmarks.agents import Running, agent
from benchmarks.harness import Sample, Unavailable, Variant, judged, measure, middle, ratio_rows
from benchmarks.stores import BUCKET, Store, store

NAME = "origin"
_CONNECTIONS = 4
_PART = 16 << 20
_SSD = models.PLACE / "ssd"


def run(quick: bool, console: Console) -> Report:
    place = models.checkpoint("125m" if quick else "1.1b", console)
    size = models.weight_bytes(place)
    try:
        with machine.huge_pages(int(size * 2.04)) as pool, store(place) as s3:  # a model for each of two agents
            options = ["--s3-endpoint", s3.endpoint, "--dram", str(size * 2), "--readers", str(_CONNECTIONS)]
            options += ["--huge-pages", "always" if pool else "never"]
            with (
                agent(*options, environment=s3.environment) as running,
                agent(*options, "--ssd", str(_SSD), environment=s3.environment) as keeper,
            ):
                for each in (running, keeper):
                    each.hold(s3.uri)  # a revision is computed once; no load that is measured computes it again
                variants = _variants(place, s3, running, keeper)
                result = measure(variants, 2 if quick else 7, title="origin", console=console)
    except Unavailable as error:
        return judged(NAME, {}, [{"variant": "(all)", "reason": str(error)}], [], quick)
    finally:
        shutil.rmtree(_SSD, ignore_errors=True)
    case: dict[str, str | float] = {
        "pages": "2 MiB" if pool else "4 KiB",
        "connections": _CONNECTIONS,
        "threads": 1,
        "prompt_tokens": 1,
    }
    pairs = {
        "origin_vs_raw": result.ratio("raw ranged GETs", "glowplug to memory", "load_s"),
        "origin_ready_vs_download_then_load": result.ratio("download, from_pretrained", "glowplug ready", "first_s"),
        "tee_cost": result.ratio("glowplug to memory and ssd", "glowplug to memory", "cpu_s"),
        "origin_ready_vs_runai": result.ratio("runai ready", "glowplug ready", "first_s"),
    }
    headline = {key: middle(pair) for key, pair in pairs.items()}
    return judged(NAME, headline, [*result.rows(**case), *ratio_rows(pairs, **case)], [result], quick)


def _variants(place: Path, s3: Store, running: Running, keeper: Running) -> list[Variant]:
    """Return the variants; `keeper` is the agent that writes the model to SSD while it arrives."""
    size = models.weight_bytes(place)
    target = models.PLACE / "downloaded"

    def served() -> None:
        running.settle()
        running.forget(s3.uri)
        machine.warm(models.weight_files(place))

    def emptied() -> None:
        served()
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)

    def to_memory() -> Sample:
        before, start = running.cpu_seconds(), time.perf_counter()
        with running.client.lease(s3.uri) as lease:
            lease.wait_ready(time.monotonic() + children.LIMIT_SECONDS)
            seconds, cpu = time.perf_counter() - start, running.cpu_seconds() - before
        return _rate(size, seconds, cpu)

    def unkept() -> None:
        keeper.settle()
        keeper.forget(s3.uri, ssd=True)
        machine.warm(models.weight_files(place))

    def to_memory_and_ssd() -> Sample:
        """Return the seconds until the bytes are in memory, and the processor seconds until they are on SSD, too."""
        before, start = keeper.cpu_seconds(), time.perf_counter()
        with keeper.client.lease(s3.uri) as lease:
            lease.wait_ready(time.monotonic() + children.LIMIT_SECONDS)
            seconds = time.perf_counter() - start
            while not any(_SSD.glob("images/*/image.json")):  # asking the agent would add to the time that is measured
                time.sleep(0.01)
            return _rate(size, seconds, keeper.cpu_seconds() - before)

    def ready() -> Sample:
        before = running.cpu_seconds()
        sample = children.run("glowplug", {"socket": str(running.socket), "uri": s3.uri})
        return {**sample, "cpu_s": sample["cpu_s"] + running.cpu_seconds() - before}

    def downloaded() -> Sample:
        job = {"endpoint": s3.endpoint, "bucket": BUCKET, "prefix": s3.prefix, "place": str(target)}
        try:
            return children.run("download_then_load", job, environment=s3.environment)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def runai() -> Sample:
        job = {"bucket": BUCKET, "prefix": s3.prefix, "config": str(place)}
        return children.run("runai_s3", job, environment=s3.environment)

    return [
        Variant("raw ranged GETs", lambda: _raw(place, s3), served),
        Variant("s3transfer to memory", lambda: _s3transfer(place, s3), served),
        Variant("glowplug to memory", to_memory, served),
        Variant("glowplug to memory and ssd", to_memory_and_ssd, unkept),
        Variant("download, from_pretrained", downloaded, emptied),
        Variant("runai ready", runai, served),
        Variant("glowplug ready", ready, served),
    ]


def _raw(place: Path, s3: Store) -> Sample:
    """Read ranges of presigned URLs by HTTP alone, into one reused buffer per connection."""
    client = s3.client()
    parts = []
    for file in models.weight_files(place):
        url = client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": f"{s3.prefix}/{file.name}"})
        size = file.stat().st_size
        parts += [(url, at, min(at + _PART, size)) for at in range(0, size, _PART)]

    def connection(number: int) -> int:
        buffer = machine.hugetlb_buffer(_PART) or mmap.mmap(-1, _PART)
        view = memoryview(buffer)
        got = 0
        host = urlsplit(s3.endpoint)
        link = http.client.HTTPConnection(host.hostname or "", host.port)
        for url, start, end in parts[number::_CONNECTIONS]:
            address = urlsplit(url)
            link.request("GET", f"{address.path}?{address.query}", headers={"Range": f"bytes={start}-{end - 1}"})
            response = link.getresponse()
            done = 0
            while count := _into(response, view, done, end - start):
                done += count
            if response.status >= 300 or done != end - start:
                raise Unavailable(f"the server answered {response.status} and {done} of {end - start} bytes")
            response.read()
            got += done
        link.close()
        view.release()
        buffer.close()  # now, and not at a later garbage collection: the pool has room for two models and little more
        return got

    return _timed(models.weight_bytes(place), lambda: _parallel(connection))


def _into(response: http.client.HTTPResponse, view: memoryview, start: int, end: int) -> int:
    with view[start:end] as rest:
        return response.readinto(rest)


def _parallel(connection: Callable[[int], int]) -> None:
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(connection, range(_CONNECTIONS)))


class _Memory:
    """A seekable file in memory of full size: s3transfer writes parts out of order."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size)
        self.seekable = lambda: True
        self.tell, self.seek, self.write = self._map.tell, self._map.seek, self._map.write


def _s3transfer(place: Path, s3: Store) -> Sample:
    """Read into memory with boto3's transfer manager, at its own defaults for parts and connections."""
    client = s3.client()
    from s3transfer.manager import TransferManager

    def transfer() -> None:
        with TransferManager(client) as manager:
            futures: list[Any] = [
                manager.download(BUCKET, f"{s3.prefix}/{file.name}", cast(IO[bytes], _Memory(file.stat().st_size)))
                for file in models.weight_files(place)
            ]
            for future in futures:
                future.result()

    return _timed(models.weight_bytes(place), transfer)


def _timed(size: int, work: Callable[[], None]) -> Sample:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return _rate(size, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _rate(size: int, seconds: float, cpu: float) -> Sample:
    return {"load_s": seconds, "mb_s": size / 1e6 / seconds, "cpu_s": cpu, "cpu_s_per_gb": cpu / size * 1e9}
