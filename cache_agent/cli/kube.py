"""The commands of `glowplug agent` that serve a cluster instead of a node: the scheduler's extender and the webhook."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path

import click

from cache_agent import config, logs

log = logging.getLogger("glowplug.cli")

_FIRST_LOOK = 2.0  # seconds that the extender waits for Redis before it answers without


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=9479, show_default=True, help="Port to listen on.")
@click.option(
    "--redis-url", help="Redis in which the agents tell what they have [env: GLOWPLUG_REDIS_URL].", metavar="URL"
)
@click.option("--redis-password-file", type=Path, help="File with Redis's password.", metavar="PATH")
@click.option("--estimates", type=Path, help="JSON file that says which node has what, instead.", metavar="PATH")
@click.option("--check", is_flag=True, help="Ask the extender that listens there whether it lives.")
@click.option("--log-level", default="info", help="debug, info, warning or error.", show_default=True)
def extender(
    host: str,
    port: int,
    redis_url: str | None,
    redis_password_file: Path | None,
    estimates: Path | None,
    check: bool,
    log_level: str,
) -> None:
    """Tell kube-scheduler which node would start a pod's model soonest."""
    from cache_agent.kube import outlook, routes
    from cache_agent.kube.extender import Extender

    logs.configure(log_level)
    with ExitStack() as stack:
        if check:
            routes.check(host, port)
            return
        settings = config.from_environment()
        url = redis_url or settings.redis_url
        known: outlook.Outlook
        if estimates is not None:
            known = outlook.FileOutlook(estimates)
        elif url:
            password = redis_password_file or settings.redis_password_file
            known = stack.enter_context(outlook.shared(url, password, _FIRST_LOOK))
        else:
            log.warning("neither --redis-url nor --estimates: all nodes are equal, and none is known to have an agent")
            known = outlook.NoOutlook()
        answers = Extender(known)
        verbs = {
            ("POST", "/scheduler/prioritize"): answers.prioritize,
            ("POST", "/scheduler/filter"): answers.filter,
        }
        routes.serve_until_stopped(routes.RoutesServer(host, port, verbs))


@click.command()
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")  # noqa: S104
@click.option("--port", type=int, default=9443, show_default=True, help="Port to listen on.")
@click.option("--certificate", type=Path, required=True, help="Certificate chain, in PEM.", metavar="PATH")
@click.option("--key", type=Path, required=True, help="Its private key, in PEM.", metavar="PATH")
@click.option("--scheduler", default="", help="Scheduler for pods that name a model, like warm-scheduler.")
@click.option("--log-level", default="info", help="debug, info, warning or error.", show_default=True)
def webhook(host: str, port: int, certificate: Path, key: Path, scheduler: str, log_level: str) -> None:
    """Give pods that name a model the agent's directory, in clusters without MutatingAdmissionPolicy."""
    from cache_agent.kube import admission, routes
    from cache_agent.kube.certificate import Certificate

    logs.configure(log_level)

    def review(body: bytes) -> routes.JsonAnswer:
        try:
            return routes.JsonAnswer(200, json.dumps(admission.review(json.loads(body), scheduler)).encode())
        except (ValueError, RecursionError) as error:  # `NotAReview` is one
            raise routes.RequestRefused(400, str(error)) from error

    pair = Certificate(certificate, key)
    routes.serve_until_stopped(routes.RoutesServer(host, port, {("POST", "/admission"): review}, pair))
