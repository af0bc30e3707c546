"""Owns the dashboard: one static page, and the data that only the page shows.

    GET /dashboard              the page; says nothing about the node, and takes no token
    GET /dashboard/page.css     likewise
    GET /dashboard/page.js      likewise
    GET /view.json              the last starts of this node's functions, the newest first, each with its diagnosis;
                                the nodes that live and what each holds, as this node's directory has it

The page asks for status and events with the operator's token, which stays in the browser's tab. The page's
Content-Security-Policy allows neither other origins nor other scripts; a test in a browser checks that.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
from flask import Blueprint, Response

from cache_agent.journal.reports import FunctionReports
from cache_agent.web.diagnosis import NodeFacts, diagnose
from cache_agent.wire.operations import ClusterReply, Start, StatusReply

PAGE = "/dashboard"
PATHS = (PAGE, "/view.json")
_FILES = {
    PAGE: ("page.html", "text/html"),
    f"{PAGE}/page.css": ("page.css", "text/css"),
    f"{PAGE}/page.js": ("page.js", "text/javascript"),
}
OPEN = tuple(_FILES)  # these need no token: the files say nothing about the node
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class ShownAgent(Protocol):
    """The part of an agent that the dashboard shows."""

    @property
    def reports(self) -> FunctionReports: ...

    def full_status(self) -> StatusReply: ...

    def cluster(self) -> ClusterReply: ...


def blueprint(agent: ShownAgent) -> Blueprint:
    """Return the routes above. The application decides who may ask for them, see `OPEN`."""
    pages = Blueprint("dashboard", __name__)
    for path, (name, kind) in _FILES.items():
        content = (Path(__file__).parent / name).read_bytes()
        pages.add_url_rule(path, Path(name).suffix[1:], partial(_file, content, kind))
    pages.add_url_rule("/view.json", "view", partial(_view, agent))
    return pages


def _file(content: bytes, kind: str) -> Response:
    return Response(content, content_type=f"{kind}; charset=utf-8", headers=_HEADERS)


def _view(agent: ShownAgent) -> Response:
    starts = diagnosed_starts(agent.reports.starts.recent(), agent.full_status())
    cluster = agent.cluster()
    body = msgspec.json.encode({"starts": starts, "nodes": cluster.nodes, "holdings": cluster.holdings})
    return Response(body, mimetype="application/json", headers={"Cache-Control": "no-store"})


def diagnosed_starts(starts: list[Start], status: StatusReply) -> list[dict[str, Any]]:
    """Return each start with its diagnosis, as JSON values."""
    huge = {model.model for model in status.models if model.page > 4096}
    diagnosed = []
    for start in starts:
        found = diagnose(start.spans, start.tier, NodeFacts(start.bytes, status.ssd is not None, start.model in huge))
        diagnosed.append({**msgspec.to_builtins(start), "diagnosis": msgspec.to_builtins(found)})
    return diagnosed
