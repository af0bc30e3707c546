"""Checkpoints for benchmarks: made once under build/ and kept there, whole or not at all."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from report import ROOT
from rich.console import Console
from tiny_model.random_checkpoint import Size, random_checkpoint

PLACE = ROOT / "build" / "bench"


def checkpoint(size: Size, console: Console, *, shards: int = 2) -> Path:
    """Return the directory of a bf16 Llama of seeded random weights."""

    def write(place: Path) -> None:
        random_checkpoint(place, arch="llama", size=size, dtype="bf16", shards=shards, seed=0)

    return _kept(PLACE / f"llama-{size}-{shards}", write, console)


def copy(original: Path, number: int, console: Console) -> Path:
    """Copy a checkpoint to files of its own, as each container image has them."""
    place = PLACE / f"{original.name}-copy-{number}"
    return _kept(place, lambda unfinished: shutil.copytree(original, unfinished), console)


def zeros(gigabytes: float, console: Console) -> Path:
    """Make a checkpoint of 290 tensors, as a 32-layer Llama has, without disk space: its bytes are a hole."""
    tensors = 290
    width = int(gigabytes * 1e9) // tensors // 8192 * 4096

    def write(place: Path) -> None:
        place.mkdir(parents=True)
        header = {
            f"model.layers.{n // 9}.weight_{n % 9}": {
                "dtype": "BF16",
                "shape": [width],
                "data_offsets": [2 * width * n, 2 * width * (n + 1)],
            }
            for n in range(tensors)
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (place / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + 2 * width * tensors)
        (place / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}\n')

    return _kept(PLACE / f"zeros-{gigabytes:g}", write, console)


def files(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_file())


def weight_files(place: Path) -> list[Path]:
    return sorted(place.glob("*.safetensors"))


def weight_bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(place))


def _kept(place: Path, write: Callable[[Path], object], console: Console) -> Path:
    if not place.exists():
        console.print(f"[dim]making {place.relative_to(ROOT)}[/]")
        unfinished = place.with_name(place.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.rename(place)
    return place
