"""The option `--url`, the address of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from runtime.resume.client import connection


def url_option(default: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # noqa: A002  click's
    """Make the option `--url`, whose value `connection` can parse."""

    def checked(_ctx: click.Context, _param: click.Parameter, url: str) -> str:
        try:
            connection(url, 0.0)
        except ValueError as error:
            raise click.UsageError(f"--url: {error}") from error
        return url

    return click.option("--url", default=default, show_default=True, callback=checked, help=help)
