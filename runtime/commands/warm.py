"""`glowplug warm`: loads models into this node's memory before they are asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from cache_agent.cli.output import bar, counted, json_option, megabytes, model_uri, print_json, socket_option
from cache_agent.cli.output import client as agent


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--pin", is_flag=True, help="Keep them: they are not evicted until they are unpinned or the agent ends.")
@click.option("--no-wait", is_flag=True, help="Only begin; `glowplug models` shows how far they are.")
@click.option("--timeout", type=float, default=3600.0, show_default=True, help="Seconds that one may take.")
@socket_option
@json_option
def warm(models: tuple[str, ...], pin: bool, no_wait: bool, timeout: float, socket: Path | None, as_json: bool) -> None:
    """Have each MODEL (a URI or a directory) in this node's memory, so that functions find it there."""
    if pin and no_wait:
        raise click.UsageError("--pin needs the model to be there, so it goes without --no-wait")
    client = agent(socket)
    rows: list[dict[str, Any]] = []
    for model in models:
        uri = model_uri(model)
        if no_wait:
            client.prefetch(uri)
            rows.append({"model": uri, "state": "loading"})
        else:
            rows.append(_warm(client, uri, timeout, pin, as_json))
        if not as_json:
            click.echo(_line(rows[-1]))
    if as_json:
        print_json({"models": rows})


def _warm(client: Any, uri: str, timeout: float, pin: bool, quiet: bool) -> dict[str, Any]:
    start = time.monotonic()
    with bar(quiet) as report, client.lease(uri, deadline=start + timeout) as lease:
        size = lease.manifest.nbytes
        report(uri, 0, size)
        lease.wait_ready(start + timeout, counted(report, uri))
        seconds = time.monotonic() - start
        if pin:  # while the lease holds the model, which could be evicted otherwise
            client.pin(uri)
        return {
            "model": uri, "state": "ready", "bytes": size, "tier": lease.tier, "revision": lease.revision,
            "page": lease.page, "seconds": round(seconds, 6), "pinned": pin,
        }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    if row["state"] == "loading":
        return f"{row['model']} is on its way"
    kept = ", pinned" if row["pinned"] else ""
    if row["tier"] == "dram":
        return f"{row['model']} was there already ({megabytes(row['bytes'])}{kept})"
    rate = row["bytes"] / 1e6 / max(row["seconds"], 1e-9)
    return (
        f"{row['model']}: {megabytes(row['bytes'])} from {row['tier']} in {row['seconds']:.2f} s "
        f"({rate:.0f} MB/s), {row['page'] >> 10} KiB pages{kept}"
    )
