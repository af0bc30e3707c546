"""Benchmarks that a stranger can repeat: one small module each, over the harness.

A benchmark NAME is the module of that name here, with `NAME` and `run(quick, console) -> Report`. Those that wait for a
part of the project which is not there yet are in `WAITING`, with what they wait for.
"""

from __future__ import annotations

from pathlib import Path

WAITING = {
    "gpu": "the device tier",
}
NAMES = ["cold-start", "load", "origin", "density", "fanout", "throughput", "handoff", "overload", *WAITING]
"""In the order in which `all` runs them."""


def module(name: str) -> str:
    return name.replace("-", "_")


def built(name: str) -> bool:
    return (Path(__file__).parent / f"{module(name)}.py").exists()
