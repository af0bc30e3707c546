"""`glowplug pool`: runs a node's pool, whose zygotes are forked into the containers that ask for them."""

from __future__ import annotations

import dataclasses
import os
import sys

import click

from cache_agent.cli.output import json_option, print_json
from runtime.config import DEFAULT_SOCKET, FunctionConfig, from_environment
from runtime.errors import BadConfig

COUNT = click.IntRange(min=0)


@click.command()
@click.option(
    "--socket", "path", default=FunctionConfig.pool, show_default=True, help="Socket to serve.", metavar="PATH"
)
@click.option("--kind", "kinds", multiple=True, help="Model type whose code is imported, like llama; repeatable.")
@click.option("--domain", default="", help="Name of the trust domain that this pool is for.")
@click.option(
    "--agent", default=DEFAULT_SOCKET, show_default=True, help="The agent's socket, for models.", metavar="PATH"
)
@click.option("--models", default=8, show_default=True, help="How many models are held ready at once.", type=COUNT)
@click.option("--spares", default=32, show_default=True, help="How many processes wait in containers.", type=COUNT)
@click.option("--seccomp", default="", help="Compiled filter for workers of filtered containers.", metavar="PATH")
@json_option
def pool(
    path: str,
    kinds: tuple[str, ...],
    domain: str,
    agent: str,
    models: int,
    spares: int,
    seccomp: str,
    as_json: bool,
) -> None:
    """Keep warm processes for all containers of this node.

    Needs root, Linux 6.5 and the node's pid namespace. Containers that it serves share the imported libraries' memory,
    and trust this process. How long models and waiting processes are held follows from GLOWPLUG_START_PRICE.
    """
    from runtime.layers import identity, keys
    from runtime.layers.spawn import Spec
    from runtime.pool.pool import Pool

    if os.geteuid() != 0:
        raise BadConfig(
            "glowplug pool must be root to place processes in other containers; pod mode needs no such right"
        )
    if seccomp and (not os.path.isfile(seccomp) or os.path.getsize(seccomp) % 8 or not os.path.getsize(seccomp)):
        raise BadConfig(f"{seccomp} is no compiled seccomp filter (instructions of 8 bytes)")

    def say(text: str) -> None:
        if as_json:
            print_json({"pool": path, "text": text})
        else:
            click.echo(f"glowplug pool: {text}", err=True)

    made_of = dataclasses.replace(identity.needs(), domain=domain, preload=kinds)
    spec = Spec(key=keys.key("lang", made_of), kinds=kinds)
    made = Pool(
        path, spec, made_of, from_environment(), agent=agent, models=models, spares=spares, seccomp=seccomp, say=say
    )
    sys.exit(made.run())
