"""The commands `glowplug push` and `glowplug pull`: arguments in, a bar or JSON out; the work is cache_agent's."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runtime.commands.output import bar, json_option

if TYPE_CHECKING:
    from cache_agent.loading.copying import Copied

_endpoint = click.option("--s3-endpoint", help="URL of an S3-compatible store [env: GLOWPLUG_S3_ENDPOINT].")


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("uri")
@_endpoint
@json_option
def push(directory: Path, uri: str, s3_endpoint: str | None, as_json: bool) -> None:
    """Copy the model in DIRECTORY to URI (s3://bucket/prefix), and check what arrived.

    Run it again after an interruption: what is there already is not sent again.
    """
    with _resumable():
        from cache_agent import config
        from cache_agent.loading import pushing
        from cache_agent.model.uri import parse_uri
        from cache_agent.tiers.s3 import S3

        settings = config.from_environment()
        store = S3(endpoint=s3_endpoint or settings.s3_endpoint, anonymous=settings.s3_anonymous)
        start = time.monotonic()
        with bar(as_json) as report:
            copied = pushing.push(directory, parse_uri(uri), store, report)
        _tell(copied, uri, "sent", time.monotonic() - start, as_json)


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@_endpoint
@json_option
def pull(uri: str, directory: Path, s3_endpoint: str | None, as_json: bool) -> None:
    """Copy the model at URI (s3://, hf:// or file://) into DIRECTORY, and check what was written.

    URI@rev-… insists on a revision. Run it again after an interruption: it goes on where it was.
    """
    with _resumable():
        import dataclasses

        from cache_agent import config
        from cache_agent.loading import copying
        from cache_agent.loading.origins import Origins
        from cache_agent.model.uri import parse_uri

        settings = config.from_environment()
        settings = dataclasses.replace(settings, s3_endpoint=s3_endpoint or settings.s3_endpoint)
        place = parse_uri(uri)
        start = time.monotonic()
        with bar(as_json) as report:
            copied = copying.pull(Origins(settings).open(place), directory, report, place.revision)
        _tell(copied, uri, "received", time.monotonic() - start, as_json)


def _tell(copied: Copied, uri: str, verb: str, seconds: float, as_json: bool) -> None:
    if as_json:
        told = {"uri": uri, **copied._asdict(), "seconds": round(seconds, 6)}
        click.echo(json.dumps(told))
        return
    rate = f" in {seconds:.1f} s ({copied.moved / 1e6 / max(seconds, 1e-9):.0f} MB/s)" if copied.moved else ""
    there = f"; {copied.skipped} of {copied.files} files were there" if copied.skipped else ""
    click.echo(f"{copied.moved / 1e6:.1f} of {copied.size / 1e6:.1f} MB {verb}{rate}{there}")
    click.echo(f"revision {copied.revision}")


@contextmanager
def _resumable() -> Iterator[None]:
    """An interrupted copy is no lost copy."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("glowplug: interrupted; the same command goes on where this one was", err=True)
        sys.exit(130)
