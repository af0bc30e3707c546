"""What the commands of `glowplug-agent` share: types of options, the way to a serving agent, errors as sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from cache_agent import config, daemon
from cache_agent.client import credentials
from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import AgentError, BadSetting

F = TypeVar("F", bound=Callable[..., Any])


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
    """A model as people type it: a URI, or a directory of this machine."""
    if "://" in text:
        return text
    return "file://" + str(Path(text).absolute()).replace("%", "%25")


def asks(function: F) -> F:
    """Options shared by the commands that talk to a serving agent."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people."
    )(function)
    return click.option(
        "--socket", "path", type=Path, default=None, help="The agent's socket [env: GLOWPLUG_SOCKET].", metavar="PATH"
    )(function)


@contextmanager
def reported() -> Iterator[None]:
    """Ends the command with the error's sentence and code."""
    try:
        yield
    except AgentError as error:
        click.echo(f"glowplug-agent: {error.text} [{error.code}]", err=True)
        sys.exit(daemon.BAD_CONFIG if isinstance(error, BadSetting) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def client(path: Path | None) -> CacheClient:
    settings = config.from_environment()
    shown = credentials.shown(settings.token_file)
    return CacheClient(path or settings.socket, name="glowplug-agent", identity=shown)
