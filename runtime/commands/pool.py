"""`glowplug pool`: a node's zygotes, forked into the containers that ask for them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import click

from runtime.commands.output import json_option, print_json
from runtime.config import FunctionConfig
from runtime.errors import BadConfig


@click.command()
@click.option(
    "--socket", "path", default=FunctionConfig.pool, show_default=True, help="Socket to serve.", metavar="PATH"
)
@click.option("--kind", "kinds", multiple=True, help="Model type whose code is imported, like llama; repeatable.")
@click.option("--domain", default="", help="Name of the trust domain that this pool is for.")
@click.option("--seccomp", default="", help="Compiled filter for workers of filtered containers.", metavar="PATH")
@json_option
def pool(path: str, kinds: tuple[str, ...], domain: str, seccomp: str, as_json: bool) -> None:
    """Keep warm processes for all containers of this node.

    Needs root, Linux 6.5 and the node's pid namespace. Containers that it serves share the imported libraries' memory,
    and trust this process.
    """
    from runtime.zygote import own
    from runtime.zygote.pool import Pool
    from runtime.zygote.spawn import Spec

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

    made_of = dataclasses.replace(own.needs(), domain=domain, preload=kinds)
    spec = Spec(key=json.dumps(dataclasses.asdict(made_of)), kinds=kinds)
    sys.exit(Pool(path, spec, say=say, seccomp=seccomp).run())
