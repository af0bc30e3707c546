"""Benchmarks that anyone can repeat: one small module each, over the harness.

A benchmark NAME is the module of that name here, with `NAME` and `run(quick, console) -> Report`.
"""

from __future__ import annotations

NAMES = ["cold-start", "load", "origin", "density", "fanout", "throughput", "handoff", "overload"]
"""The benchmarks, in the order in which `all` runs them."""


def module(name: str) -> str:
    return name.replace("-", "_")
