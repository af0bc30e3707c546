"""What commands share towards the terminal: `--json`, the agent's `--socket`, and a bar with rate and time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import click

if TYPE_CHECKING:
    import msgspec

    from cache_agent.client.cache_client import CacheClient

F = TypeVar("F", bound=Callable[..., Any])
Report = Callable[[str, int, int], None]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people."
)
socket_option = click.option("--socket", type=Path, help="The agent's socket [env: GLOWPLUG_SOCKET].", metavar="PATH")


def place_of(url: str) -> SplitResult:
    """Where a function is served; `http://` may be left out. Raises `UsageError`."""
    place = urlsplit(url if "://" in url else f"http://{url}")
    if place.scheme not in ("http", "https") or not place.hostname:
        raise click.UsageError(f"--url is {url!r}; use http://HOST:PORT, or http://GATEWAY/function/NAME")
    return place


def print_json(value: msgspec.Struct | list[Any] | dict[str, Any]) -> None:
    """One value on one line."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def agent(socket: Path | str | None) -> CacheClient:
    """A client of this node's agent. Raises `BadConfig`."""
    from cache_agent import config
    from cache_agent.client import credentials
    from cache_agent.client.cache_client import CacheClient

    settings = config.from_environment()
    return CacheClient(socket or settings.socket, name="glowplug", identity=credentials.shown(settings.token_file))


def megabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


@contextmanager
def bar(quiet: bool) -> Iterator[Report]:
    """`report(stage, count, total)` draws a bar with rate and time left for each stage; only on a terminal."""
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
