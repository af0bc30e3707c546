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

if TYPE_CHECKING:
    from cache_agent.copying import Copied, Report

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people.")
_endpoint = click.option("--s3-endpoint", help="URL of an S3-compatible store [env: GLOWPLUG_S3_ENDPOINT].")


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("uri")
@_endpoint
@_json
def push(directory: Path, uri: str, s3_endpoint: str | None, as_json: bool) -> None:
    """Copy the model in DIRECTORY to URI (s3://bucket/prefix), and check what arrived.

    Run it again after an interruption: what is there already is not sent again.
    """
    with _reported():
        from cache_agent import config, pushing
        from cache_agent.tiers.origin import parse_uri
        from cache_agent.tiers.s3 import S3

        settings = config.from_environment()
        store = S3(endpoint=s3_endpoint or settings.s3_endpoint, anonymous=settings.s3_anonymous)
        start = time.monotonic()
        with _bar(as_json) as report:
            copied = pushing.push(directory, parse_uri(uri), store, report)
        _tell(copied, uri, "sent", time.monotonic() - start, as_json)


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@_endpoint
@_json
def pull(uri: str, directory: Path, s3_endpoint: str | None, as_json: bool) -> None:
    """Copy the model at URI (s3://, hf:// or file://) into DIRECTORY, and check what was written.

    URI@rev-… insists on a revision. Run it again after an interruption: it goes on where it was.
    """
    with _reported():
        import dataclasses

        from cache_agent import config, copying
        from cache_agent.origins import Origins
        from cache_agent.tiers.origin import parse_uri

        settings = config.from_environment()
        settings = dataclasses.replace(settings, s3_endpoint=s3_endpoint or settings.s3_endpoint)
        place = parse_uri(uri)
        start = time.monotonic()
        with _bar(as_json) as report:
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
def _bar(quiet: bool) -> Iterator[Report]:
    """A bar with rate and time left for each stage, on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda _stage, _count, _total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, tuple[TaskID, int]] = {}

        def report(stage: str, count: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total), total
            task, before = tasks[stage]
            if before != total or bar.tasks[task].finished:  # the next file's check
                bar.reset(task, total=total)
            tasks[stage] = task, total
            bar.advance(task, count)

        yield report


@contextmanager
def _reported() -> Iterator[None]:
    """Ends the command with the error's sentence and code."""
    from cache_agent.errors import AgentError, BadConfig

    try:
        yield
    except AgentError as error:
        click.echo(f"glowplug: {error.text} [{error.code}]", err=True)
        sys.exit(64 if isinstance(error, BadConfig) else 1)
    except KeyboardInterrupt:
        click.echo("glowplug: interrupted; the same command goes on where this one was", err=True)
        sys.exit(130)
