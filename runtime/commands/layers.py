"""`glowplug layers`: shows the layers that are kept here, for how long, and why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cache_agent.cli.output import json_option, megabytes, print_json
from runtime.layers import published

_WIDTHS = (6, 9, 9, 10, 9)


@click.command()
@click.option("--why", is_flag=True, help="Say for each layer why it is held or not.")
@click.option("--in", "place", type=Path, help="Where it is published [default: the directory of temporary files].")
@json_option
def layers(why: bool, place: Path | None, as_json: bool) -> None:
    """Show the layers that this container's function, or this node's pool, holds.

    Run it where they are: in the function's container, or in the pool's.
    """
    found = list(published.read(place))
    if as_json:
        print_json(found)
        return
    if not found:
        raise click.ClickException(
            "nothing holds layers here; run this in the container of a function that has been idle, or of the pool"
        )
    now = time.monotonic()
    for each in found:
        price = f", ρ = {each['rho']:g} GB·s a second" if each["rho"] else ""
        click.echo(f"{each['mode']} {each['name']} (pid {each['pid']}){price}")
        click.echo(_line(("layer", "state", "for", "memory", "left")))
        for layer in each["layers"]:
            age = None if layer["since"] is None else max(0.0, now - layer["since"])
            idle = "" if age is None else _span(age)
            memory = "" if layer["state"] in ("absent", "building") else megabytes(layer["bytes"])
            click.echo(_line((layer["level"], layer["state"], idle, memory, _left(layer, age))))
            if why:
                click.echo(f"          {_reason(layer)}")
            if of := " with ".join(filter(None, (layer.get("function"), layer.get("model")))):
                click.echo(f"          of {of}")


def _line(cells: Sequence[str]) -> str:
    return "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _left(layer: dict[str, Any], age: float | None) -> str:
    """Return how long an idle layer is still held; "" for one that is not idle."""
    if age is None or layer["state"] != "idle":
        return ""
    hold = layer.get("hold")
    return "no end" if hold is None else _span(max(0.0, hold - age))


def _reason(layer: dict[str, Any]) -> str:
    """Return the reason of a layer's state; a decision on a layer in use holds for afterwards."""
    why = layer.get("why", "")
    match layer["state"]:
        case "used":
            return "something runs on it; afterwards " + why if why else "something runs on it"
        case "building":
            return "it is being built"
    return f"{why}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
