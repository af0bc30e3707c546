"""`glowplug base`: compares the locked set of distributions, installs beside it, and prints a lock."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cache_agent.cli.output import json_option, print_json
from runtime.commands import baseset
from runtime.errors import BadConfig


@click.group()
def base() -> None:
    """The locked set of distributions that all functions share."""


@base.command()
@json_option
def check(as_json: bool) -> None:
    """Compare what is installed with the lock."""
    found = baseset.differences(baseset.read_lock())
    if as_json:
        print_json({"digest": baseset.digest(baseset.read_lock()), "differences": found})
        sys.exit(BadConfig.exit_code if found else 0)
    for sentence in found:
        click.echo(sentence, err=True)
    if found:
        click.echo("glowplug: the base set is not the locked one; install with: pip install -c base.lock", err=True)
        sys.exit(BadConfig.exit_code)
    click.echo(f"the base set agrees with its lock ({baseset.digest(baseset.read_lock())[:12]})")


@base.command()
@click.option("-r", "--requirements", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--target", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where to install.")
@json_option
def install(requirements: Path, target: Path, as_json: bool) -> None:
    """Install a function's own requirements beside the base; fails if they would change it."""
    installed = baseset.install(requirements, target, baseset.read_lock())
    if as_json:
        print_json({"installed": installed})
        return
    click.echo(f"installed beside the base: {', '.join(installed) or 'nothing, the base has it all'}")


@base.command()
@json_option
def lock(as_json: bool) -> None:
    """Print a lock of what is installed here (for those who maintain the base)."""
    if as_json:
        print_json({"pins": baseset.closure("glowplug[model]")})
        return
    for name, version in sorted(baseset.closure("glowplug[model]").items()):
        click.echo(f"{name}=={version}")
