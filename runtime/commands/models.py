"""`glowplug models`: shows the models of this node, with tier, bytes, leases and age."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cache_agent.cli.output import client as agent
from cache_agent.cli.output import json_option, megabytes, print_json, socket_option

if TYPE_CHECKING:
    from cache_agent.wire.operations import ClusterReply, StatusReply


@click.command()
@click.option("--cluster", "everywhere", is_flag=True, help="Of other nodes, too, as this node's directory has it.")
@socket_option
@json_option
def models(everywhere: bool, socket: Path | None, as_json: bool) -> None:
    """Show which models this node holds: tier, bytes, leases, age."""
    client = agent(socket)
    status = client.status()
    found = rows(status)
    if everywhere:
        found += elsewhere(client.cluster(), status)
    if as_json:
        print_json({"node": status.node, "capacity": status.capacity, "used": status.used, "models": found})
        return
    click.echo(f"node {status.node}: {megabytes(status.used)} of {megabytes(status.capacity)} of memory in use")
    if status.ssd is not None:
        click.echo(
            f"SSD {status.ssd.directory}: {megabytes(status.ssd.used)} of {megabytes(status.ssd.capacity)} in use"
        )
    if not found:
        click.echo("it holds no model; glowplug warm MODEL brings one in")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("model", *(["node"] if everywhere else []), "tier", "state", "size", "leases", "age", "revision"):
        table.add_column(heading, justify="right" if heading in ("size", "leases", "age") else "left", overflow="fold")
    for row in found:
        state = f"{row['state']} {row['done'] / row['bytes']:.0%}" if row["state"] == "loading" else row["state"]
        table.add_row(
            escape(row["model"]), *([escape(row["node"])] if everywhere else []), row["tier"],
            f"{state}, pinned" if row["pinned"] else state, megabytes(row["bytes"]),
            "-" if row["leases"] is None else str(row["leases"]), age(row["age_seconds"]), row["revision"][:12] or "-",
        )  # fmt: skip
    Console().print(table)


def elsewhere(cluster: ClusterReply, status: StatusReply) -> list[dict[str, Any]]:
    """Return rows of other nodes' models.

    The directory has revisions and sources; the URI is known only for models that this node has, too.
    """
    names = {known: model.model for model in status.models for known in (model.revision, model.source)}
    names |= {known: image.model for image in (status.ssd.images if status.ssd else ()) for known in (image.source,)}
    return [
        {
            "model": names.get(held.model, held.model), "node": held.node, "tier": held.tier,
            "state": "ready" if held.done == held.total else "loading", "bytes": held.total, "done": held.done,
            "leases": None, "pinned": False, "revision": held.model if held.model.startswith("rev-") else "",
            "age_seconds": None, "idle_seconds": None,
        }
        for held in cluster.holdings
        if held.node != status.node
    ]  # fmt: skip


def rows(status: StatusReply) -> list[dict[str, Any]]:
    """Return rows of this node's models, one for each model and tier; memory first."""
    found: list[dict[str, Any]] = [
        {
            "model": model.model, "node": status.node, "tier": model.tier, "state": model.state, "bytes": model.bytes,
            "done": model.done, "leases": model.leases, "pinned": model.pinned, "revision": model.revision,
            "age_seconds": round(model.age_seconds, 1), "idle_seconds": round(model.idle_seconds, 1),
        }
        for model in status.models
    ]  # fmt: skip
    images = status.ssd.images if status.ssd else []
    return found + [
        {
            "model": image.model, "node": status.node, "tier": "ssd", "state": "ready", "bytes": image.bytes,
            "done": image.bytes, "leases": image.users, "pinned": False, "revision": image.revision,
            "age_seconds": None, "idle_seconds": None,
        }
        for image in images
    ]  # fmt: skip


def age(seconds: float | None) -> str:
    """Write an age like "42 s", "3 min", "5 h" or "2 d"; "-" for None."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
