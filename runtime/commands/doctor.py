"""`glowplug doctor`: checks this machine, its agent and its stores, and gives advice; names a start's bottleneck.

Each check returns or yields `Finding`s; none changes anything, and none raises.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click

from cache_agent.cli.output import client as agent
from cache_agent.cli.output import json_option, megabytes, print_json, socket_option
from runtime.commands.address import url_option

if TYPE_CHECKING:
    from cache_agent.config import AgentConfig
    from cache_agent.wire.operations import Start, StatusReply

_OPEN_FILES = 4096
_REDIS_SECONDS = 2.0
_OTHER_VARIABLES = {"GLOWPLUG_TORCH_INDEX", "GLOWPLUG_REPLAY_ROOT"}  # of scripts
# The tests' own, and the variables that Kubernetes and Docker set for each Service that is called glowplug-something.
_FOREIGN = re.compile(r"^GLOWPLUG_TEST_|_SERVICE_(HOST|PORT)|_PORT$|_PORT_\d+_(TCP|UDP)")
_SERVED = "http://127.0.0.1:8080"
_URL_SECONDS = 2.0


class Finding(NamedTuple):
    """The result of one check; `advice` is "" where nothing is to be done."""

    check: str
    state: Literal["ok", "note", "warning", "failed"]
    text: str
    advice: str = ""


@click.command()
@url_option(_SERVED, "The function whose start is looked at, where no agent has heard of one.")
@click.option("--model", help="Also ask whether the agent can have this model, and how long it would take.")
@socket_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, url: str, model: str | None, socket: Path | None, as_json: bool) -> None:
    """Check this machine and its agent, and name the bottleneck of the last start.

    A start is known to the node's agent; that of a function with an agent of its own is asked for at --url.

    Ends with 1 when something is broken; warnings do not count.
    """
    from cache_agent import config

    settings = config.from_environment()
    findings = [*_machine(settings), *_stores(settings)]
    status, starts, found = _agent(socket or settings.socket)
    findings.append(found)
    if status is not None:
        findings += _node(status)
        if model:
            findings.append(_model(socket, model))
    last = None
    if starts and status is not None:
        last = last_start(starts[0], status.ssd is not None, any(model.page > 4096 for model in status.models))
    elif (start := _served(url)) is not None:
        last = last_start(start, settings.ssd is not None, False)
    if as_json:
        print_json({"findings": [finding._asdict() for finding in findings], "last_start": last})
    else:
        _show(findings, last)
    ctx.exit(1 if any(finding.state == "failed" for finding in findings) else 0)


def _machine(settings: AgentConfig) -> Iterator[Finding]:
    from cache_agent import __version__, limits

    yield Finding("versions", "ok", f"glowplug {__version__}, Python {platform.python_version()}, {platform.release()}")
    yield _settings()
    yield _base()
    limit, free = limits.memory_limit(), limits.available_bytes()
    budget = settings.capacity
    text = f"{megabytes(limit)} may be used, {megabytes(free)} are free; an agent started here has {megabytes(budget)}"
    huge = limits.free_huge_bytes()
    if budget > limit + huge:
        yield Finding("memory", "warning", text, "lower GLOWPLUG_DRAM, or the kernel ends the agent before it is full")
    else:
        yield Finding("memory", "ok", text)
    if huge:
        yield Finding("huge pages", "ok", f"{megabytes(huge)} of 2 MiB pages are free")
    else:
        advice = "reserve a pool: sysctl vm.nr_hugepages=N, N times 2 MiB; loading from SSD is more than twice as quick"
        yield Finding("huge pages", "note", "no 2 MiB pages are reserved", advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < _OPEN_FILES:
        yield Finding(
            "open files", "warning", f"at most {hard}", "raise the limit (ulimit -n): each function takes two"
        )
    else:
        yield Finding("open files", "ok", f"{soft}, and {hard} for the agent")


def _settings() -> Finding:
    """Find variables that look like settings and are none: former ones, and misspelt ones."""
    import dataclasses

    from cache_agent import config as agents
    from runtime import config as functions

    fields = (*dataclasses.fields(agents.AgentConfig), *dataclasses.fields(functions.FunctionConfig))
    known = {f"GLOWPLUG_{field.name.upper()}" for field in fields} | _OTHER_VARIABLES
    texts = [*functions.gone(os.environ), *agents.gone(os.environ)]
    named = {text.partition(" ")[0] for text in texts}
    other = {name for name in os.environ if name.startswith("GLOWPLUG_") and not _FOREIGN.search(name)}
    texts += [f"{name} is no setting and changes nothing" for name in sorted(other - known - named)]
    if not texts:
        return Finding("settings", "ok", "every GLOWPLUG_ variable that is set is a setting")
    return Finding("settings", "warning", "; ".join(texts), "the README's tables name all settings")


def _base() -> Finding:
    from runtime.commands import baseset
    from runtime.errors import FunctionError

    try:
        found = baseset.differences(baseset.read_lock())
    except FunctionError as error:
        return Finding("base set", "warning", error.text)
    if not found:
        return Finding("base set", "ok", "what is installed agrees with the lock")
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    advice = "functions share warm processes only with one base; glowplug base check names all"
    return Finding("base set", "note", f"{found[0]}{more}", advice)


def _stores(settings: AgentConfig) -> Iterator[Finding]:
    yield (
        _redis(settings)
        if settings.redis_url
        else Finding(
            "Redis",
            "note",
            "none is set: this node knows only itself",
            "name one with GLOWPLUG_REDIS_URL for a cluster",
        )
    )
    yield _s3(settings)


def _redis(settings: AgentConfig) -> Finding:
    from cache_agent.cluster import redis_connection
    from cache_agent.errors import BadSetting

    try:
        version = redis_connection.version(settings.redis_url, settings.redis_password_file, _REDIS_SECONDS)
    except BadSetting as error:
        return Finding("Redis", "failed", error.text, "see the settings in cache_agent/cluster/README.md")
    except OSError as error:
        return Finding(
            "Redis", "failed", f"it cannot be used: {error}", "nodes serve on, but do not know of each other"
        )
    if version and int(version.partition(".")[0]) < 7:
        return Finding("Redis", "failed", f"it is version {version}", "7 or newer is needed")
    return Finding("Redis", "ok", f"version {version} answers" if version else "it answers")


def _s3(settings: AgentConfig) -> Finding:
    if settings.s3_anonymous:
        return Finding("S3", "ok", "read without credentials (GLOWPLUG_S3_ANONYMOUS)")
    import boto3
    import botocore.exceptions

    try:
        found = boto3.Session().get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        return Finding("S3", "failed", f"credentials are set and cannot be used: {error}", "see ~/.aws and AWS_*")
    where = settings.s3_endpoint or "AWS"
    if found is None:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --s3-anonymous, if models lie there"
        return Finding("S3", "note", f"no credentials for {where} were found here", advice)
    return Finding("S3", "ok", f"credentials for {where} come from {found.method}")


def _agent(path: Path) -> tuple[StatusReply | None, list[Start], Finding]:
    from cache_agent.errors import AgentError

    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        return (
            None,
            [],
            Finding(
                "agent",
                "failed",
                f"{path} is not yours to open",
                "start the agent with --socket-mode 660 and join its group",
            ),
        )
    try:
        client = agent(path)
        status, starts = client.status(), client.starts()
    except AgentError as error:
        state: Literal["note", "failed"] = "failed" if path.exists() else "note"
        advice = "functions start one each: more memory, slower starts. glowplug agent serve gives the node one"
        return None, [], Finding("agent", state, error.text.partition(";")[0], advice)
    text = f"node {status.node}, pid {status.pid}: {megabytes(status.used)} of {megabytes(status.capacity)} in use"
    return status, starts, Finding("agent", "ok", text)


def _node(status: StatusReply) -> Iterator[Finding]:
    if status.ssd is None:
        yield Finding("SSD tier", "note", "it is off", "glowplug agent serve --ssd DIR keeps models across restarts")
    elif bad := status.ssd.quarantined:
        text = f"{len(bad)} damaged images were set aside, like {bad[0].name}: {bad[0].reason}"
        yield Finding("SSD tier", "warning", text, "one is chance; more of them are a disk that fails")
    else:
        room = f"{megabytes(status.ssd.used)} of {megabytes(status.ssd.capacity)} in use"
        yield Finding("SSD tier", "ok", f"{status.ssd.directory}: {room}")
    for tier in status.tiers:
        text = f"{tier.rate / 1e6:.0f} MB/s over {tier.loads} loads, estimates off by {tier.error:.0%}"
        yield Finding(f"tier {tier.tier}", "ok", text)
    if status.orphaned:
        text = f"{megabytes(status.orphaned)} are mapped by functions and not lent by this agent"
        yield Finding("orphans", "warning", text, "they go when those functions end")


def _model(socket: Path | None, model: str) -> Finding:
    from cache_agent.cli.output import model_uri
    from cache_agent.errors import AgentError

    try:
        reply = agent(socket).estimate(model_uri(model))
    except AgentError as error:
        return Finding("model", "failed", f"{error.text} [{error.code}]")
    text = (
        f"{megabytes(reply.bytes)} from {reply.tier}, about {reply.seconds:.2f} s (confidence {reply.confidence:.0%})"
    )
    return Finding("model", "ok", text)


def _served(url: str) -> Start | None:
    """Return the last start of the function at `url`, as it reports it; None where none answers."""
    import http.client
    import json

    from cache_agent.ledger import Span
    from cache_agent.wire.operations import Start
    from runtime.resume.client import connection

    def get(path: str) -> Any:
        asked, base = connection(url, _URL_SECONDS)
        with contextlib.closing(asked):
            asked.request("GET", base + path)
            answer = asked.getresponse()
            if answer.status != http.client.OK:
                raise OSError(f"{url} answers {answer.status}")
            return json.load(answer)

    try:
        ledger, size = get("/_/ledger"), 0
        with contextlib.suppress(OSError):  # 503 while it is starting
            size = get("/_/ready")["total"]
        spans = [Span(s["owner"], s["name"], s["start_ns"], s["end_ns"]) for s in ledger["spans"]]
        tier = "origin" if any((span.owner, span.name) == ("agent", "transfer") for span in spans) else "dram"
        return Start(ledger["start_id"], url, "", ledger["start"], 0.0, spans, "", tier, size)
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None


def last_start(start: Start, ssd: bool, huge_pages: bool) -> dict[str, Any] | None:
    """Return the diagnosis of a start, for the terminal and for JSON; None for a start without spans."""
    from cache_agent.web.diagnosis import NodeFacts, diagnose

    found = diagnose(start.spans, start.tier, NodeFacts(start.bytes, ssd, huge_pages))
    if found is None:
        return None
    return {
        "start_id": start.start_id,
        "function": start.function,
        "kind": start.kind,
        "error": start.error,
        "seconds": round(found.seconds, 6),
        "bottleneck": found.bottleneck,
        "share": round(found.share, 4),
        "rate": round(found.rate),
        "sentence": found.sentence,
        "phases": {name: round(seconds, 6) for name, seconds in found.phases.items()},
    }


_MARKS: dict[str, tuple[str, str]] = {
    "ok": ("✓", "green"), "note": ("·", "dim"), "warning": ("!", "yellow"), "failed": ("✗", "red"),
}  # fmt: skip


def _show(findings: list[Finding], last: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.check) for finding in findings)
    for check, state, text, advice in findings:
        mark, style = _MARKS[state]
        console.print(f"[{style}]{mark}[/] {check:{width}}  {escape(text)}")
        if advice:
            console.print(f"  {'':{width}}  [dim]{escape(advice)}[/]")
    if last is None:
        console.print("\nNo start is known: ask a function first, or say with --url where one is served.")
        return
    failed = f" It failed: {escape(last['error'])}." if last["error"] else ""
    console.print(f"\nThe last start ({escape(last['function'])}, {last['kind']}): {escape(last['sentence'])}.{failed}")
