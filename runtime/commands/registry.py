"""The registry of commands: modules imported late; one sentence and one exit code per error."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

USAGE, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


class Registered(NamedTuple):
    """A command's place (`module:attribute`), and its line in the list of commands."""

    place: str
    help: str


class Commands(click.Group):
    """A group that knows its commands by name and imports one only when it runs."""

    def __init__(self, registered: Mapping[str, Registered], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.registered = registered

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.registered)  # in the order in which a new user needs them

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in self.registered:
            return None
        module, _, attribute = self.registered[name].place.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{name} is a command"
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in self.registered and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.registered, n=1)
            ctx.fail(f"There is no command {name!r}" + (f"; did you mean {near[0]}?" if near else "."))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.registered.items()])

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the command as click does, with `_print_error` for click's errors and for ours."""
        group: Any = super()  # click's overloads need to know `standalone_mode` before it runs
        if not standalone_mode:
            return group.main(*arguments, standalone_mode=False, **options)
        try:
            code = group.main(*arguments, standalone_mode=False, **options)
        except Exception as error:
            code = _print_error(error)
            if code is None:
                raise
        sys.exit(code if isinstance(code, int) else 0)


def _print_error(error: Exception) -> int | None:
    """Print an error as one sentence; return the exit code, or None for a defect, which is raised again."""
    from cache_agent.errors import AgentError, BadSetting
    from runtime.errors import FunctionError

    match error:
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message())
            return 0
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else "glowplug"
            sentence = " ".join(error.format_message().split()).removesuffix(".")
            _say(f"{sentence[:1].lower()}{sentence[1:]} ({where} --help says more)")
            return USAGE
        case click.Abort():
            _say("interrupted")
            return INTERRUPTED
        case click.ClickException():
            _say(error.format_message())
            return error.exit_code
        case AgentError():
            _say(f"{error.text} [{error.code}]")
            return 64 if isinstance(error, BadSetting) else FAILED
        case FunctionError():
            _say(f"{error.text} [{error.code}]")
            return error.exit_code
        case BrokenPipeError():
            # The reader of the output is gone; the interpreter must not complain at its end.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        case OSError() if error.filename is not None:
            _say(f"{error.filename} cannot be used: {error.strerror}")
            return FAILED
    return None


def _say(sentence: str) -> None:
    click.echo(f"glowplug: {sentence}", err=True)
