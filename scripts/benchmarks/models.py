"""Owns the checkpoints that benchmarks read: seeded random weights, made once under build/ and kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from report import ROOT
from rich.console import Console

PLACE = ROOT / "build" / "bench"


def checkpoint(
    size: Literal["125m", "1.1b"],
    console: Console,
    *,
    arch: Literal["llama", "qwen2", "mistral", "gpt2"] = "llama",
    layers: int | None = None,
    shards: int = 2,
) -> Path:
    """The directory of a bf16 checkpoint; half-made ones are never left in its place."""
    place = PLACE / f"{arch}-{size}-{shards}{f'-{layers}' if layers else ''}"
    if not place.exists():
        from tiny_model.random_checkpoint import random_checkpoint

        console.print(f"[dim]making a checkpoint of random weights in {place.relative_to(ROOT)}[/]")
        unfinished = place.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        random_checkpoint(unfinished, arch=arch, size=size, dtype="bf16", shards=shards, seed=0, layers=layers)
        unfinished.rename(place)
    return place


def files(place: Path) -> list[Path]:
    """What must be dropped from the page cache for a cold start."""
    return [path for path in place.iterdir() if path.is_file()]
