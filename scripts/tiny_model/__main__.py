"""The command line of `scripts/make_tiny_model`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from tiny_model import training
from tiny_model.random_checkpoint import Arch, Dtype, Size, random_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Make the models that demo, tests and benchmarks use. Nothing is fetched from a model hub."""


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=REPOSITORY / "templates/llm-python/model",
    show_default="templates/llm-python/model",
)
@click.option("--seed", default=0)
@click.option("--steps", default=300, type=click.IntRange(min=1))
@click.option("--threads", default=2, type=click.IntRange(min=1), help="Another number gives other bits.")
def train(out: Path, seed: int, steps: int, threads: int) -> None:
    """Train the small Llama of the demo on the project's own documentation."""
    training.train(REPOSITORY, out, seed=seed, steps=steps, threads=threads, report=click.echo)


@main.command()
@click.option("--arch", type=click.Choice(get_args(Arch)), default="llama")
@click.option("--size", type=click.Choice(get_args(Size)), default="tiny")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="bf16")
@click.option("--shards", default=1, type=click.IntRange(min=1))
@click.option("--tied/--untied", default=None, help="Head shares the embedding; default: as usual for --arch.")
@click.option("--seed", default=0)
@click.option("--layers", default=None, type=click.IntRange(min=1), help="Another number of layers than the size has.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
def random(
    arch: Arch, size: Size, dtype: Dtype, shards: int, tied: bool | None, seed: int, layers: int | None, out: Path
) -> None:
    """Write a checkpoint of seeded random weights."""
    try:
        random_checkpoint(out, arch=arch, size=size, dtype=dtype, shards=shards, tied=tied, seed=seed, layers=layers)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    weights = sorted(out.glob("*.safetensors"))
    click.echo(f"{out}: {sum(file.stat().st_size for file in weights) / 1e6:.1f} MB in {len(weights)} shard(s)")


if __name__ == "__main__":
    main(prog_name="scripts/make_tiny_model")
