"""Whole functions: one is told to end in the middle of an answer, and its client has all of it over one connection."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.sse import EventParser

# Long enough that a busy machine has found the destination, over two agents, before the answer is out.
BODY = {"prompt": "a glow plug", "max_tokens": 1200, "temperature": 1.0, "seed": 7, "ignore_eos": True}


def _frames(function: Any, body: Any) -> Iterator[Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", function.port, timeout=180)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        parser, response = EventParser(), connection.getresponse()
        assert response.status == 200
        while chunk := response.read1(65536):
            for event in parser.feed(chunk):
                if event.data == "[DONE]":
                    return
                yield json.loads(event.data)


@pytest.fixture
def agents(start_agent: Callable[..., Any], redis_url: str, tmp_path: Path) -> tuple[Any, Any]:
    """Two nodes', who know each other."""
    (key := tmp_path / "key").write_text("c" * 32)
    made = []
    for name in ("n1", "n2"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            listen = f"127.0.0.1:{free.getsockname()[1]}"
        options = ("--redis-url", redis_url, "--cluster-key-file", str(key), "--agent-listen", listen)
        made.append(start_agent(*options, "--node", name))
    return made[0], made[1]


@pytest.mark.parametrize("case", ["one node, not kept", "two nodes, kept, with a key"])
def test_sigterm_moves_a_stream_and_the_function_ends_well(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    started: Callable[..., Any],
    eventually: Callable[..., Any],
    tmp_path: Path,
    case: str,
) -> None:
    if case.startswith("two"):
        here, there = request.getfixturevalue("agents")
        (key := tmp_path / "function-key").write_text("f" * 32)
        settings: dict[str, object] = {"checkpoints": "chat", "function_key_file": key, "drain_grace": 600}
    else:
        here = there = request.getfixturevalue("agent")
        settings = {"handoff": "chat", "drain_grace": 600}
    first, second = (started(model=checkpoint, socket=agent.socket, **settings) for agent in (here, there))
    for function in (first, second):
        function.wait_ready()
    whole = second.request("/v1/completions", BODY).json
    text, usage = "", None
    streamed = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    for number, frame in enumerate(_frames(first, streamed)):
        if number == 20:
            first.process.send_signal(signal.SIGTERM)
            assert ": moved, to " in first.says("the model is released"), first.output()
            maps = Path(f"/proc/{first.worker()}/maps").read_text()
            assert "memfd:glowplug" not in maps, "and its memory is"
        assert "error" not in frame, frame
        text += "".join(one["text"] for one in frame["choices"])
        usage = frame["usage"] or usage
    assert text == whole["choices"][0]["text"]
    assert usage == whole["usage"]
    assert first.wait() == 0, first.output()
    (moved,) = eventually(lambda: here.client.status().handoffs)
    assert (moved.function, moved.outcome) == ("chat", "moved")


def test_a_function_that_ends_right_after_its_first_token_has_told_its_agent_of_it(
    agent: Any, checkpoint: Path, started: Callable[..., Any]
) -> None:
    """Spans are told about once a second; what is new at the end goes out before the process does."""
    function = started(model=checkpoint, socket=agent.socket).wait_ready()
    function.request("/v1/completions", {**BODY, "max_tokens": 1})
    assert function.stop() == 0, function.output()
    (start,) = agent.client.starts()
    assert "first token" in {span.name for span in start.spans}
