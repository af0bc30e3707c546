"""`glowplug place`: shows where a model would start soonest, and why."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from cache_agent.cli.output import client as agent
from cache_agent.cli.output import json_option

_PATIENCE = 5.0  # seconds for Redis to answer


@click.command()
@click.argument("model")
@click.option(
    "--redis-url", help="Redis in which the agents tell what they have [env: GLOWPLUG_REDIS_URL].", metavar="URL"
)
@click.option("--redis-password-file", type=Path, help="File with Redis's password.", metavar="PATH")
@click.option("--estimates", type=Path, help="JSON file that says which node has what, instead.", metavar="PATH")
@click.option("--socket", "path", help="The agent to ask instead, about its own node.", metavar="PATH")
@click.option("--why", is_flag=True, help="Say how each node's seconds come about.")
@json_option
def place(
    model: str,
    redis_url: str | None,
    redis_password_file: Path | None,
    estimates: Path | None,
    path: str | None,
    why: bool,
    as_json: bool,
) -> None:
    """Show where MODEL would start soonest: on each node that the directory knows, or on this one alone."""
    from cache_agent import config
    from cache_agent.cli.output import model_uri
    from cache_agent.kube.outlook import AgentOutlook, FileOutlook, Outlook, Unavailable, shared
    from cache_agent.policy import placement

    with ExitStack() as stack:
        settings = config.from_environment()
        outlook: Outlook
        if estimates is not None:
            outlook = FileOutlook(estimates)
        elif path is None and (url := redis_url or settings.redis_url):
            password = redis_password_file or settings.redis_password_file
            outlook = stack.enter_context(shared(url, password, _PATIENCE))
        else:
            outlook = AgentOutlook(agent(path))
        try:
            view = outlook.look(model_uri(model))
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
