"""`glowplug completion`: prints the script that a shell completes commands and options with."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from cache_agent.cli.output import json_option, print_json

HOW = {
    "bash": 'eval "$(glowplug completion bash)"',
    "zsh": 'eval "$(glowplug completion zsh)"',
    "fish": "glowplug completion fish | source",
}


@click.command()
@click.argument("shell", type=click.Choice(list(HOW)))
@json_option
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print a script that makes SHELL complete glowplug's commands and options.

    \b
    ~/.bashrc                   eval "$(glowplug completion bash)"
    ~/.zshrc, after compinit    eval "$(glowplug completion zsh)"
    ~/.config/fish/config.fish  glowplug completion fish | source
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these shells"
    script = kind(ctx.find_root().command, {}, "glowplug", "_GLOWPLUG_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "script": script, "setup": HOW[shell]})
    else:
        click.echo(script)
