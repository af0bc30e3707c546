"""`glowplug serve`: becomes the shim of a function, with its options as the shim's environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

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
def serve(folder: Path | None, **options: object) -> None:
    """Serve the function in FOLDER (its handler.py), or the OpenAI routes alone.

    Every option can also be set in the environment, as GLOWPLUG_MODEL, GLOWPLUG_PORT and so on.
    """
    for name, value in options.items():
        if value is not None:
            os.environ[OPTIONS[name]] = str(value)
    if "port" in options and options["port"] is not None:
        os.environ.pop("PORT", None)
    if folder is not None:
        os.environ["GLOWPLUG_HANDLER"] = str(folder)
    # The shim takes this process's place: nothing of the command line's imports stays in memory.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "runtime.shim"])  # noqa: S606
