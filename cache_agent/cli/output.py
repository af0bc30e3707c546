"""The commands' common parts: options, the client of the serving agent, JSON, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import msgspec

    from cache_agent.client.cache_client import CacheClient

Report = Callable[[str, int, int], None]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people."
)
socket_option = click.option("--socket", type=Path, help="The agent's socket [env: GLOWPLUG_SOCKET].", metavar="PATH")


class Parsed(click.ParamType[Any]):
    """A click type from a parser that raises `ValueError`."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            return self.fail(f"{value!r}: {error}", param, ctx)


def model_uri(text: str) -> str:
    """Return the URI of a model as people type it: a URI, or a directory of this machine."""
    if "://" in text:
        return text
    return "file://" + str(Path(text).absolute()).replace("%", "%25")


def client(socket: Path | str | None) -> CacheClient:
    """Return a client of this node's agent. Raises `BadSetting`."""
    from cache_agent import config
    from cache_agent.client import credentials
    from cache_agent.client.cache_client import CacheClient

    settings = config.from_environment()
    return CacheClient(socket or settings.socket, name="glowplug", identity=credentials.shown(settings.token_file))


def print_json(value: msgspec.Struct | list[Any] | dict[str, Any]) -> None:
    """Print one value as JSON on one line."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def megabytes(size: float) -> str:
    """Return bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


@contextmanager
def bar(quiet: bool) -> Iterator[Report]:
    """Yield `report(stage, count, total)`, which draws a bar for each stage; only on a terminal.

    `count` is the increment and `total` the stage's size, in bytes.
    """
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
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, tuple[TaskID, int]] = {}

        def report(stage: str, count: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total), total
            task, before = tasks[stage]
            if before != total or progress.tasks[task].finished:  # the next file's check
                progress.reset(task, total=total)
            tasks[stage] = task, total
            progress.advance(task, count)

        yield report


def counted(report: Report, stage: str) -> Callable[[int, int], None]:
    """Return an `on_progress(done, total)` for a lease that reports increments of one stage of a bar."""
    there = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal there
        report(stage, done - there, total)
        there = done

    return on_progress
