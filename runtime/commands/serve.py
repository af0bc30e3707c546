"""`glowplug serve`: becomes the shim of a function, with its options as the shim's environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from cache_agent.cli.output import json_option, print_json

OPTIONS = {
    "model": "GLOWPLUG_MODEL",
    "port": "GLOWPLUG_PORT",
    "host": "GLOWPLUG_HOST",
    "socket": "GLOWPLUG_SOCKET",
    "slots": "GLOWPLUG_SLOTS",
    "threads": "GLOWPLUG_THREADS",
    "name": "GLOWPLUG_NAME",
    "log_level": "GLOWPLUG_LOG_LEVEL",
}


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", help="URI or directory of the model.")
@click.option("--port", type=int, help="Port to serve.")
@click.option("--host", help="Address to listen on.")
@click.option("--socket", help="The agent's socket; without it the node's agent, or a private one.", metavar="PATH")
@click.option("--slots", type=int, help="Generations that run at once.")
@click.option("--threads", type=int, help="Threads for the model.")
@click.option("--name", help="What the OpenAI routes call the model.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option(
    "--reload", "follow", is_flag=True, help="For development: serve changes of the handler as they are saved."
)
@json_option
def serve(folder: Path | None, follow: bool, as_json: bool, **options: object) -> None:
    """Serve the function in FOLDER (its handler.py), or the OpenAI routes alone.

    Every option can also be set in the environment, as GLOWPLUG_MODEL, GLOWPLUG_PORT and so on. --json says in one
    line what is going to be served; after it, this process is the function.
    """
    for name, value in options.items():
        if value is not None:
            os.environ[OPTIONS[name]] = str(value)
    if options.get("port") is not None:
        os.environ.pop("PORT", None)  # the option goes before, also before a PORT without sense
    if folder is not None:
        os.environ["GLOWPLUG_HANDLER"] = str(folder)
    if follow:
        if "GLOWPLUG_HANDLER" not in os.environ:
            raise click.UsageError("--reload follows the handler in FOLDER, and no FOLDER was named")
        os.environ["GLOWPLUG_RELOAD"] = "1"
    if as_json:
        from runtime.config import from_environment

        config = from_environment()
        print_json(
            {"pid": os.getpid(), "host": config.host, "port": config.port, "model": config.model_uri}
            | {"name": config.served_name, "handler": config.handler, "reload": config.reload}
        )
        sys.stdout.flush()
    # The shim replaces this process, so that the command line's imports do not stay in memory.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "runtime.shim"])  # noqa: S606
