"""Owns the dashboard: one static page, and what it shows that no other path has.

    GET /dashboard              the page; it holds nothing about the node, and so is shown to anybody
    GET /dashboard/page.css     likewise
    GET /dashboard/page.js      likewise
    GET /view.json              the last starts of this node's functions, the newest first, each with its diagnosis;
                                the nodes that live, and which holds what, as this node's directory has it

The page asks for the rest (status, events) with the operator's token, which a tab keeps for itself. It loads nothing
from elsewhere and runs no script but its own: its Content-Security-Policy says so, and a test in a browser looks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import msgspec
from flask import Blueprint, Response

from cache_agent.journal.reports import FunctionReports
from cache_agent.web.diagnosis import NodeFacts, diagnose
from cache_agent.wire.operations import ClusterReply, Start, StatusReply

PAGE = "/dashboard"
PATHS = (PAGE, "/view.json")
OPEN = (PAGE, f"{PAGE}/page.css", f"{PAGE}/page.js")  # nothing in them is about the node
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ShownAgent(Protocol):
    """What of an agent is shown."""

    @property
    def reports(self) -> FunctionReports: ...

    def full_status(self) -> StatusReply: ...

    def cluster(self) -> ClusterReply: ...


def blueprint(agent: ShownAgent) -> Blueprint:
    """The paths above; whether a request is allowed is for the application to say, see `OPEN`."""
    pages = Blueprint("dashboard", __name__)
    files = {name: (Path(__file__).parent / name).read_bytes() for name in ("page.html", "page.css", "page.js")}

    def file(name: str) -> Response:
        response = Response(files[name], content_type=f"{_KINDS[Path(name).suffix]}; charset=utf-8")
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-cache"
        return response

    @pages.get(PAGE)
    def page() -> Response:
        return file("page.html")

    @pages.get(f"{PAGE}/page.css")
    def style() -> Response:
        return file("page.css")

    @pages.get(f"{PAGE}/page.js")
    def script() -> Response:
        return file("page.js")

    @pages.get("/view.json")
    def view() -> Response:
        starts = told_starts(agent.reports.starts.recent(), agent.full_status())
        cluster = agent.cluster()
        body = msgspec.json.encode({"starts": starts, "nodes": cluster.nodes, "holdings": cluster.holdings})
        return Response(body, mimetype="application/json", headers={"Cache-Control": "no-store"})

    return pages


def told_starts(starts: list[Start], status: StatusReply) -> list[dict[str, Any]]:
    """Each start with its diagnosis, as JSON has it."""
    huge = {model.model for model in status.models if model.page > 4096}
    told = []
    for start in starts:
        found = diagnose(start.spans, start.tier, NodeFacts(start.bytes, status.ssd is not None, start.model in huge))
        told.append({**msgspec.to_builtins(start), "diagnosis": msgspec.to_builtins(found)})
    return told
