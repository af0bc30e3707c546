"""The `glowplug` command."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cache_agent import __version__
from runtime import baseset, copies
from runtime.config import FunctionConfig
from runtime.errors import BadConfig, FunctionError

_OPTIONS = {
    "model": "GLOWPLUG_MODEL",
    "port": "GLOWPLUG_PORT",
    "host": "GLOWPLUG_HOST",
    "socket": "GLOWPLUG_SOCKET",
    "slots": "GLOWPLUG_SLOTS",
    "threads": "GLOWPLUG_THREADS",
    "name": "GLOWPLUG_NAME",
    "log_level": "GLOWPLUG_LOG_LEVEL",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glowplug")
def main() -> None:
    """Warm starts for LLM functions."""


main.add_command(copies.push)
main.add_command(copies.pull)


@main.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", help="URI or directory of the model.")
@click.option("--port", type=int, help="Port to serve.")
@click.option("--host", help="Address to listen on.")
@click.option("--socket", help="The agent's socket; without it the node's agent, or a private one.", metavar="PATH")
@click.option("--slots", type=int, help="Generations that run at once.")
@click.option("--threads", type=int, help="Threads for the model.")
@click.option("--name", help="What the OpenAI routes call the model.")
@click.option("--log-level", help="debug, info, warning or error.")
def serve(folder: Path | None, **options: object) -> None:
    """Serve the function in FOLDER (its handler.py), or the OpenAI routes alone.

    Every option can also be set in the environment, as GLOWPLUG_MODEL, GLOWPLUG_PORT and so on.
    """
    for name, value in options.items():
        if value is not None:
            os.environ[_OPTIONS[name]] = str(value)
    if "port" in options and options["port"] is not None:
        os.environ.pop("PORT", None)
    if folder is not None:
        os.environ["GLOWPLUG_HANDLER"] = str(folder)
    # The shim takes this process's place: nothing of the command line's imports stays in memory.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "runtime.shim"])  # noqa: S606


@main.command()
@click.argument("name")
@click.option("--platform", type=click.Choice(["knative", "openfaas"]), required=True)
@click.option("--image", required=True, help="The function's image, like registry.example.com/team/chat:1.")
@click.option("--model", required=True, help="URI of the model, or a directory of the image.")
@click.option("--namespace", default="", help="Namespace of the function.")
@click.option(
    "--slots", type=int, default=FunctionConfig.slots, show_default=True, help="Generations that run at once."
)
@click.option("--timeout", type=int, default=300, show_default=True, help="Seconds that one answer may take.")
@click.option("--start-timeout", type=int, default=600, show_default=True, help="Seconds that a start may take.")
@click.option("--memory", default="4Gi", show_default=True, help="Memory of a replica.")
@click.option("--cpu", default="1", show_default=True, help="Processors that a replica asks for.")
@click.option("--gpus", type=int, default=0, help="GPUs of a replica (Knative).")
@click.option("--min-scale", type=int, default=0, help="Replicas that always run.")
@click.option("--max-scale", type=int, default=0, help="Most replicas; 0 leaves it to the platform.")
@click.option("--retention", default="", help="How long the last replica stays, like 10m (Knative).")
@click.option(
    "--inject",
    type=click.Choice(["policy", "fields", "none"]),
    default="policy",
    show_default=True,
    help="How a pod gets to its agent: the cluster's policy, fields of the Service (need feature flags), not at all.",
)
@click.option("--scheduler", default="", help="With --inject fields: the scheduler, like warm-scheduler.")
@click.option("--token-secret", default="", help="Secret with the token that the agent asks for.")
@click.option("--env", "pairs", multiple=True, metavar="NAME=VALUE", help="More of its environment; repeatable.")
def render(platform: str, pairs: tuple[str, ...], **options: Any) -> None:
    """Print the objects that make NAME a function of the platform."""
    import yaml

    from runtime import render as renderer

    with _reported():
        environment = dict(pair.partition("=")[::2] for pair in pairs)
        function = renderer.Function(environment=environment, **options)
        objects = renderer.knative(function) if platform == "knative" else renderer.openfaas(function)
    click.echo(yaml.safe_dump_all(objects, sort_keys=False, width=120), nl=False)


@main.command()
@click.argument("model")
@click.option("--estimates", type=Path, help="JSON file that says which node has what.", metavar="PATH")
@click.option("--socket", "path", help="The agent to ask instead, about its own node.", metavar="PATH")
@click.option("--why", is_flag=True, help="Say how each node's seconds come about.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people.")
def place(model: str, estimates: Path | None, path: str | None, why: bool, as_json: bool) -> None:
    """Show where MODEL would start soonest."""
    from cache_agent import daemon
    from cache_agent.cli import model_uri
    from cache_agent.client import CacheClient
    from cache_agent.config import from_environment
    from cache_agent.errors import AgentError
    from cache_agent.outlook import AgentOutlook, FileOutlook, Outlook, Unavailable
    from cache_agent.policy import placement

    try:
        if estimates is not None:
            outlook: Outlook = FileOutlook(estimates)
        else:
            settings = from_environment()
            token = daemon.read_token(settings)
            outlook = AgentOutlook(CacheClient(path or settings.socket, name="glowplug", token=token))
        view = outlook.look(model_uri(model))
    except AgentError as error:
        raise click.ClickException(f"{error.text} [{error.code}]") from error
    except Unavailable as error:
        raise click.ClickException(str(error)) from error
    if view is None or not view.nodes:
        raise click.ClickException(f"no node knows {model}")
    found = placement.rank(view)
    scores = placement.scores(found, [decision.node for decision in found])
    if as_json:
        rows = [{**decision._asdict(), "score": scores[decision.node]} for decision in found]
        click.echo(json.dumps([{**row, "seconds": _finite(row["seconds"])} for row in rows]))
        return
    width = max(len(decision.node) for decision in found)
    for decision in found:
        seconds = "never" if decision.seconds == math.inf else f"{decision.seconds:8.2f} s"
        click.echo(f"{decision.node:{width}}  {seconds:>10}  {decision.way:4}  score {scores[decision.node]:2}")
        if why:
            guessed = "" if decision.measured == 1.0 else f" ({1 - decision.measured:.0%} of it assumed, not measured)"
            click.echo(f"{'':{width}}  {decision.why}{guessed}")


def _finite(seconds: Any) -> float | None:
    return round(seconds, 3) if math.isfinite(seconds) else None


@main.group()
def base() -> None:
    """The locked set of distributions that all functions share."""


@base.command()
def check() -> None:
    """Compare what is installed with the lock."""
    with _reported():
        found = baseset.differences(baseset.read_lock())
    for sentence in found:
        click.echo(sentence, err=True)
    if found:
        click.echo("glowplug: the base set is not the locked one; install with: pip install -c base.lock", err=True)
        sys.exit(BadConfig.exit_code)
    click.echo(f"the base set agrees with its lock ({baseset.digest(baseset.read_lock())[:12]})")


@base.command()
@click.option("-r", "--requirements", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--target", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where to install.")
def install(requirements: Path, target: Path) -> None:
    """Install a function's own requirements beside the base; fails if they would change it."""
    with _reported():
        installed = baseset.install(requirements, target, baseset.read_lock())
    click.echo(f"installed beside the base: {', '.join(installed) or 'nothing, the base has it all'}")


@base.command()
def lock() -> None:
    """Print a lock of what is installed here (for those who maintain the base)."""
    for name, version in sorted(baseset.closure("glowplug[model]").items()):
        click.echo(f"{name}=={version}")


@contextmanager
def _reported() -> Iterator[None]:
    """Ends the command with the error's sentence and exit code."""
    try:
        yield
    except FunctionError as error:
        click.echo(f"glowplug: {error.text} [{error.code}]", err=True)
        sys.exit(error.exit_code)
