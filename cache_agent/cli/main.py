"""The group `glowplug agent`: serve, and ask a serving agent."""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cache_agent import __version__, config, daemon, logs
from cache_agent.cli.kube import extender, webhook
from cache_agent.cli.output import Parsed, bar, client, counted, json_option, model_uri, print_json, socket_option

_LOAD_SECONDS = 3600.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glowplug agent")
def agent() -> None:
    """The node-local cache agent: one sealed copy of a model's weights for all functions of a node."""


@agent.command()
@click.option("--socket", type=Path, help="Unix socket to serve.", metavar="PATH")
@click.option("--socket-mode", type=Parsed("mode", config.parse_mode), help="Octal mode of the socket.")
@click.option("--node", help="This node's name.")
@click.option("--dram", type=Parsed("size", config.parse_size), help="Memory for weights, like 16G.")
@click.option("--huge-pages", type=click.Choice(["auto", "always", "never"]), help="Use the pool of 2 MiB pages.")
@click.option("--ssd", type=Path, help="Directory of a fast disk to keep models in.", metavar="DIR")
@click.option("--ssd-size", type=Parsed("size", config.parse_size), help="Disk space for models, like 100G.")
@click.option(
    "--file-root", "file_roots", type=Path, multiple=True, help="Directory that file:// may name; repeatable."
)
@click.option("--s3-endpoint", help="URL of an S3-compatible store.")
@click.option("--s3-anonymous/--s3-signed", default=None, help="Read S3 without credentials.")
@click.option("--redis-url", help="Redis that the nodes share; without it this node knows only itself.", metavar="URL")
@click.option("--redis-password-file", type=Path, help="File with Redis's password.", metavar="PATH")
@click.option("--cluster-key-file", type=Path, help="File with the secret that all agents share.", metavar="PATH")
@click.option("--snapshot-ttl", type=float, help="Seconds that a request is kept after its last token.")
@click.option("--snapshot-space", type=Parsed("size", config.parse_size), help="Most that is kept of one function.")
@click.option("--agent-listen", help="TCP address for other nodes and distant functions.", metavar="HOST:PORT")
@click.option("--agent-address", help="Where others reach it, if not there.", metavar="HOST:PORT")
@click.option("--peer-witnesses", type=int, help="Nodes that must have read what a node takes from peers.")
@click.option("--readers", type=int, help="Most parallel reads per load; how many are made depends on what they yield.")
@click.option("--identity", type=click.Choice(["none", "token", "kubernetes"]), help="How clients prove who they are.")
@click.option(
    "--token-file", type=Path, help="File with the secret that clients must present, or a directory.", metavar="PATH"
)
@click.option("--rights", type=Path, help="TOML file that says who may have which models.", metavar="PATH")
@click.option("--revalidate", type=float, help="Seconds after which a model's origin is checked again.")
@click.option("--stale", type=float, help="Seconds that a model outlives its origin's last answer; 0: it does not.")
@click.option("--max-connections", type=int, help="Functions and commands connected at once.")
@click.option("--kubernetes", help="URL of the Kubernetes API, to see which pods of this node are being removed.")
@click.option("--status", help="Address for metrics, state and events over HTTP, like 127.0.0.1:9480.", metavar="ADDR")
@click.option("--status-open", type=Parsed("paths", config.parse_words), help="Of those, what takes no token.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Log for people, or an object a line.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    help="How much to log.",
    show_default=True,
)
def serve(log_level: str, **options: Any) -> None:
    """Serve the weights of this node until SIGTERM.

    Every option can also be set in the environment, as GLOWPLUG_SOCKET, GLOWPLUG_DRAM and so on.
    """
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    settings = dataclasses.replace(config.from_environment(), **given)
    logs.configure(log_level, settings.log_format)
    daemon.Daemon(settings).run()


@agent.command()
@click.argument("model")
@socket_option
@json_option
def load(model: str, socket: Path | None, as_json: bool) -> None:
    """Bring MODEL (a URI or a directory) into this node's memory."""
    start = time.monotonic()
    uri = model_uri(model)
    with bar(as_json) as report, client(socket).lease(uri) as lease:
        lease.wait_ready(start + _LOAD_SECONDS, counted(report, uri))
        seconds = time.monotonic() - start
        size, tier, page, revision = lease.manifest.nbytes, lease.tier, lease.page, lease.revision
    if as_json:
        print_json({"bytes": size, "tier": tier, "page": page, "revision": revision, "seconds": round(seconds, 6)})
    elif tier == "dram":
        click.echo(f"{size / 1e6:.0f} MB are resident already")
    else:
        click.echo(
            f"{size / 1e6:.0f} MB loaded in {seconds:.2f} s ({size / 1e6 / seconds:.0f} MB/s), {page >> 10} KiB pages"
        )


@agent.command()
@socket_option
@json_option
def status(socket: Path | None, as_json: bool) -> None:
    """Show which models are resident, and who holds them."""
    reply = client(socket).status()
    if as_json:
        print_json(reply)
        return
    click.echo(f"node {reply.node}, pid {reply.pid}: {reply.used / 1e6:.0f} of {reply.capacity / 1e6:.0f} MB in use")
    if reply.ssd is not None:
        click.echo(f"SSD {reply.ssd.directory}: {reply.ssd.used / 1e6:.0f} of {reply.ssd.capacity / 1e6:.0f} MB in use")
        for stored in reply.ssd.images:
            click.echo(f"  {stored.model}  {stored.revision[:12] or '-'}  {stored.bytes / 1e6:.0f} MB")
        for bad in reply.ssd.quarantined:
            click.echo(f"  set aside: {bad.name}: {bad.reason}")
    for tier in reply.tiers:
        click.echo(
            f"{tier.tier}: {tier.rate / 1e6:.0f} MB/s over {tier.loads} loads, estimates off by {tier.error:.0%}"
        )
    if reply.orphaned:
        click.echo(f"{reply.orphaned / 1e6:.0f} MB are mapped by functions and not lent by this agent")
    if not reply.models:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "revision", "state", "MB", "loaded", "pages", "leases", "idle"):
        table.add_column(heading, justify="left" if heading in ("model", "revision", "state") else "right")
    for model in reply.models:
        table.add_row(
            escape(model.model),
            model.revision[:12] or "-",
            f"{model.state}, pinned" if model.pinned else model.state,
            f"{model.bytes / 1e6:.0f}",
            f"{model.done / model.bytes:.0%}",
            f"{model.page >> 10}K",
            str(model.leases),
            f"{model.idle_seconds:.0f} s" if not model.leases else "-",
        )
    Console().print(table)


@agent.command()
@click.option("--since", type=int, default=0, help="Number of the last event that is known already.")
@socket_option
@json_option
def events(since: int, socket: Path | None, as_json: bool) -> None:
    """Show what happened on the node lately, and why."""
    found = client(socket).events(since)
    if as_json:
        print_json(found)
        return
    for event in found:
        click.echo(f"{event.number:6}  {datetime.fromtimestamp(event.time):%Y-%m-%d %H:%M:%S}  {event.text}")


@agent.command()
@click.argument("model")
@click.option("--ssd", is_flag=True, help="Remove it from the SSD, too.")
@socket_option
@json_option
def evict(model: str, ssd: bool, socket: Path | None, as_json: bool) -> None:
    """Give MODEL's memory back; refused while a function holds it."""
    reply = client(socket).evicted(model_uri(model), ssd=ssd)
    size = reply.bytes + reply.ssd
    click.echo(json.dumps({"bytes": size, "stays": reply.stays}) if as_json else f"{size / 1e6:.0f} MB given back")
    if reply.stays and not as_json:
        click.echo(f"held, and not given back yet: {reply.stays}")


@agent.command()
@click.argument("model")
@socket_option
@json_option
def pin(model: str, socket: Path | None, as_json: bool) -> None:
    """Keep MODEL, which must be resident: it is not evicted until it is unpinned or the agent ends."""
    size = client(socket).pin(model_uri(model))
    click.echo(json.dumps({"bytes": size}) if as_json else f"{size / 1e6:.0f} MB are pinned")


@agent.command()
@click.argument("model")
@socket_option
@json_option
def unpin(model: str, socket: Path | None, as_json: bool) -> None:
    """Let MODEL be evicted again."""
    size = client(socket).pin(model_uri(model), pinned=False)
    click.echo(json.dumps({"bytes": size}) if as_json else f"{size / 1e6:.0f} MB may be evicted")


@agent.command()
@click.argument("model")
@socket_option
@json_option
def prefetch(model: str, socket: Path | None, as_json: bool) -> None:
    """Begin to bring MODEL into memory; `status` shows how far it is, and nobody holds it."""
    client(socket).prefetch(model_uri(model))
    click.echo(json.dumps({"prefetching": model_uri(model)}) if as_json else f"{model_uri(model)} is on its way")


@agent.command()
@click.argument("model")
@socket_option
@json_option
def estimate(model: str, socket: Path | None, as_json: bool) -> None:
    """Say how long MODEL would take to be ready on this node now."""
    reply = client(socket).estimate(model_uri(model))
    if as_json:
        print_json(reply)
    else:
        click.echo(
            f"{reply.bytes / 1e6:.0f} MB from {reply.tier}: {reply.seconds:.2f} s, confidence {reply.confidence:.0%}"
        )


@agent.command()
@click.argument("model")
@socket_option
@json_option
def manifest(model: str, socket: Path | None, as_json: bool) -> None:
    """Show how MODEL would be laid out; reads headers only."""
    plan = client(socket).manifest(model_uri(model))
    if as_json:
        print_json(plan)
        return
    click.echo(
        f"{len(plan.tensors)} tensors, {plan.nbytes / 1e6:.0f} MB in {len(plan.segments)} segments, "
        f"from {len(plan.weight_files)} files; source {plan.source}"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "dtype", "shape", "segment", "offset", "bytes"):
        table.add_column(heading, justify="left" if heading in ("tensor", "dtype", "shape") else "right")
    for tensor in plan.tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        table.add_row(
            escape(tensor.name), tensor.dtype, shape, str(tensor.segment), str(tensor.offset), str(tensor.size)
        )
    Console().print(table)


@agent.command()
@click.option("--model", default="", help="Only functions that hold this model.")
@click.option("--grace", type=float, default=30.0, help="Seconds the functions have.", show_default=True)
@click.option("--reason", default="asked for", help="What the functions' logs will say.")
@socket_option
@json_option
def drain(model: str, grace: float, reason: str, socket: Path | None, as_json: bool) -> None:
    """Tell this node's functions to finish or hand over what they run."""
    holders = client(socket).push_drain(reason, grace, model_uri(model) if model else "")
    click.echo(json.dumps({"holders": holders}) if as_json else f"{holders} functions were told")


agent.add_command(extender)
agent.add_command(webhook)
