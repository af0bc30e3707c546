"""`glowplug render`: prints a function's objects, for `kubectl apply` or `faas-cli`."""

from __future__ import annotations

from typing import Any

import click

from cache_agent.cli.output import json_option, print_json
from runtime.config import FunctionConfig


@click.command()
@click.argument("name")
@click.option("--platform", type=click.Choice(["knative", "openfaas"]), required=True)
@click.option("--image", required=True, help="The function's image, like registry.example.com/team/chat:1.")
@click.option("--model", required=True, help="URI of the model, or a directory of the image.")
@click.option("--namespace", default="", help="Namespace of the function.")
@click.option(
    "--slots", type=int, default=FunctionConfig.slots, show_default=True, help="Generations that run at once."
)
@click.option("--timeout", type=int, default=300, show_default=True, help="Seconds that one answer may take.")
@click.option("--start-timeout", type=int, default=600, show_default=True, help="Seconds that a start may take.")
@click.option("--memory", default="4Gi", show_default=True, help="Memory of a replica.")
@click.option("--cpu", default="1", show_default=True, help="Processors that a replica asks for.")
@click.option("--min-scale", type=int, default=0, help="Replicas that always run.")
@click.option("--max-scale", type=int, default=0, help="Most replicas; 0 leaves it to the platform.")
@click.option("--retention", default="", help="How long the last replica stays, like 10m (Knative).")
@click.option(
    "--inject",
    type=click.Choice(["policy", "fields", "tcp", "none"]),
    default="policy",
    show_default=True,
    help="How a pod gets to its agent: the cluster's policy, fields of the Service (need flags), TCP, not at all.",
)
@click.option("--scheduler", default="", help="With --inject fields: the scheduler, like warm-scheduler.")
@click.option("--token-secret", default="", help="Secret with the token that the agent asks for.")
@click.option("--env", "pairs", multiple=True, metavar="NAME=VALUE", help="More of its environment; repeatable.")
@json_option
def render(platform: str, pairs: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Print the objects that make NAME a function of the platform."""
    import yaml

    from runtime.commands import objects as renderer

    environment = dict(pair.partition("=")[::2] for pair in pairs)
    function = renderer.Function(environment=environment, **options)
    objects = renderer.knative(function) if platform == "knative" else renderer.openfaas(function)
    if as_json:
        print_json(objects[0] if len(objects) == 1 else {"apiVersion": "v1", "kind": "List", "items": objects})
        return
    click.echo(yaml.safe_dump_all(objects, sort_keys=False, width=120), nl=False)
