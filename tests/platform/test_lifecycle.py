"""A function's life on OpenFaaS: another template's handler under the platform's restrictions, and SIGTERM."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import re
import socket
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)

# Uses all that python3-http gives a handler, and nothing of ours.
PYTHON3_HTTP = """
    import json


    def handle(event, context):
        if event.method == "POST" and not event.body:
            return {"statusCode": 400, "body": "send something", "headers": {"Content-Type": "text/plain"}}
        seen = {
            "method": event.method,
            "path": event.path,
            "query": event.query.get("name", "nobody"),
            "header": event.headers.get("X-Kind"),
            "body": json.loads(event.body) if event.body else None,
            "hostname": context.hostname,
        }
        return {
            "statusCode": 201,
            "body": json.dumps(seen),
            "headers": {"Content-Type": "application/json", "X-Seen": "yes"},
        }
    """
GATED = """
    import threading

    gate = threading.Event()


    def handle(event, context):
        if event.path == "/open":
            gate.set()
        return wait() if event.path == "/wait" else "answered"


    def wait():
        yield "first "
        gate.wait()
        yield "last"
    """


def test_a_python3_http_handler_runs_unchanged_and_locked_down(
    make_image: Callable[..., Any], start_watchdog: Callable[..., Any]
) -> None:
    image = make_image(textwrap.dedent(PYTHON3_HTTP))
    with start_watchdog(image, env={"HOSTNAME": "chat-5d8"}, locked_down=True) as function:
        body = json.dumps({"a": [1, None]}).encode()
        answer = function.ask("/a/path?name=me", body, method="PUT", X_Kind="test")
        assert answer.status == 201, answer.body
        assert (answer.headers["Content-Type"], answer.headers["X-Seen"]) == ("application/json", "yes")
        assert answer.json == {
            "method": "PUT",
            "path": "/a/path",
            "query": "me",
            "header": "test",
            "body": {"a": [1, None]},
            "hostname": "chat-5d8",
        }
        assert function.ask("/", method="GET").json["query"] == "nobody"
        refused = function.ask("/")
        assert (refused.status, refused.body) == (400, b"send something")
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert function.ask("/v1/chat/completions", json.dumps(chat)).status == 200
        process = Path(f"/proc/{function.process.pid}")
        assert "\nUid:\t12000\t12000\t12000" in (process / "status").read_text()
        assert re.search(r" / / ro[, ]", (process / "mountinfo").read_text())
        assert "Read-only file system" not in function.output()
        assert "Permission denied" not in function.output()


def test_from_one_to_zero_and_back_with_streams_in_flight(
    make_image: Callable[..., Any], start_watchdog: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    """All streams complete, requests that are still routed here are answered, and the end is an exit of 0."""
    interval = {"healthcheck_interval": "3s", "GLOWPLUG_DRAIN_LINGER": "4"}
    image = make_image(textwrap.dedent(GATED))
    with start_watchdog(image, env=interval) as function:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(function.open("/wait", Accept="text/event-stream")) for _ in range(3)]
            for stream in streams:
                assert stream.read1() == b"data: first \n\n"
            function.terminate()
            eventually(lambda: "draining: SIGTERM" in function.output(), what="the worker drains")
            for _ in range(5):
                late = function.ask("/late")
                assert (late.status, late.body) == (200, b"answered")
            assert function.ask("/_/ready", method="GET").status == 503
            eventually(lambda: refuses(function.port), what="the watchdog takes no more")
            assert function.process.poll() is None, "it waits for the streams"
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", function.upstream, timeout=30)) as direct:
                direct.request("POST", "/open")
                assert direct.getresponse().status == 200
            for stream in streams:
                assert stream.read() == b"data: last\n\ndata: [DONE]\n\n"
        assert function.process.wait(30) == 0
    with start_watchdog(image) as function:
        again = function.ask("/late")
        assert (again.status, again.body) == (200, b"answered")
        function.terminate()
        assert function.process.wait(30) == 0


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
