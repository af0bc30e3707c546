"""`glowplug init`: makes the folder of a new function, as `faas-cli new` does, without faas-cli."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import click

from cache_agent.cli.output import json_option, print_json

FILES = ("handler.py", "handler_test.py", "pytest.ini", "requirements.txt")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="", help="URI of its model; without one the image's demo model answers.")
@json_option
def init(folder: Path, model: str, as_json: bool) -> None:
    """Make FOLDER with a handler, its tests and its requirements, and a stack file beside it.

    The folder's name becomes the function's. Files that exist are never overwritten.
    """
    folder = folder.absolute()
    if not _NAME.fullmatch(folder.name):
        raise click.UsageError(
            f"{folder.name!r} cannot name a function: use lower-case letters, digits and dashes, 63 at most"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} exists and is not empty; choose another name, or remove it")
    template = resources.files("runtime").joinpath("template")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_bytes(template.joinpath(name).read_bytes())
    stack = folder.parent / "stack.yaml"
    written = not stack.exists()
    if written:
        stack.write_text(_stack(template.joinpath("stack.yaml").read_text(encoding="utf-8"), folder.name, model))
    if as_json:
        files = [str(folder / name) for name in FILES]
        print_json({"name": folder.name, "folder": str(folder), "files": files, "stack": str(stack) if written else ""})
        return
    click.echo(f"{folder} has {', '.join(FILES)}; {_about(stack, folder.name, written)}")
    click.echo(f"try it:  glowplug serve {folder.name} --reload --model {model or 's3://bucket/prefix'}")
    click.echo('ask it:  glowplug ask --handler "What is Glowplug?"')
    click.echo(f"test it: pytest {folder.name}")


def _stack(example: str, name: str, model: str) -> str:
    """Return the template's example stack file with this function's name and model."""
    text = re.sub(r"(?<![\w-])chat(?![\w-])", name, example)
    line = "      GLOWPLUG_MODEL: "
    return re.sub(rf"{line}.*", f"{line}{model}" if model else "      # GLOWPLUG_MODEL: s3://bucket/prefix", text)


def _about(stack: Path, name: str, written: bool) -> str:
    if written:
        return f"{stack} deploys it with faas-cli up"
    return f"{stack} was there and is as it was: add {name} to its functions"
