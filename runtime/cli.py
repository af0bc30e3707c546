"""The `glowplug` command: the list of its commands, each in a module of `runtime/commands` that its call imports."""

from __future__ import annotations

import sys

import click

from cache_agent import __version__
from runtime.commands.registry import Commands, Registered

COMMANDS = {
    "init": Registered("runtime.commands.init:init", "Make the folder of a new function."),
    "serve": Registered("runtime.commands.serve:serve", "Serve the function in a folder, or the OpenAI routes alone."),
    "ask": Registered("runtime.commands.ask:ask", "Ask a function, and see what its start and its answer took."),
    "warm": Registered("runtime.commands.warm:warm", "Have models in this node's memory before they are asked for."),
    "models": Registered("runtime.commands.models:models", "Show which models this node holds."),
    "doctor": Registered("runtime.commands.doctor:doctor", "Check this machine; name the last start's bottleneck."),
    "place": Registered("runtime.commands.place:place", "Show where a model would start soonest."),
    "render": Registered("runtime.commands.render:render", "Print a function's objects for Knative or OpenFaaS."),
    "layers": Registered("runtime.commands.layers:layers", "Show which layers are held, for how long, and why."),
    "pool": Registered("runtime.commands.pool:pool", "Keep warm processes for all containers of this node."),
    "agent": Registered("cache_agent.cli.main:agent", "Serve a node's models, and ask the agent that does."),
    "base": Registered("runtime.commands.base:base", "The locked set of distributions that all functions share."),
    "completion": Registered("runtime.commands.completion:completion", "Print what makes a shell complete commands."),
}

main = Commands(
    COMMANDS,
    name="glowplug",
    help="Warm starts for LLM functions.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
main = click.version_option(__version__, prog_name="glowplug")(main)


def former_agent() -> None:
    """Run `glowplug-agent`, the former name of `glowplug agent`, which stays for one version."""
    click.echo("glowplug-agent is `glowplug agent` now; the former name goes with the next version", err=True)
    main(["agent", *sys.argv[1:]])
