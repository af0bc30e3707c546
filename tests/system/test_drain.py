"""Whole functions: one is told to end in the middle of an answer, and its client has all of it over one connection."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.sse import EventParser

BODY = {"prompt": "a glow plug", "max_tokens": 500, "temperature": 1.0, "seed": 7, "ignore_eos": True}


def _frames(function: Any, body: Any) -> Iterator[Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", function.port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        parser, response = EventParser(), connection.getresponse()
        assert response.status == 200
        while chunk := response.read1(65536):
            for event in parser.feed(chunk):
                if event.data == "[DONE]":
                    return
                yield json.loads(event.data)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_sigterm_moves_a_stream_and_the_function_ends_well(
    agent: Any, checkpoint: Path, started: Callable[..., Any], eventually: Callable[..., Any], kept: bool
) -> None:
    settings = {"socket": agent.socket, "checkpoints" if kept else "handoff": "chat"}
    first, second = (started(model=checkpoint, **settings) for _ in range(2))
    for function in (first, second):
        function.wait_ready()
    whole = second.request("/v1/completions", BODY).json
    text, usage = "", None
    streamed = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    for number, frame in enumerate(_frames(first, streamed)):
        if number == 20:
            first.process.send_signal(signal.SIGTERM)
            first.says("the model is released")
            maps = Path(f"/proc/{first.worker()}/maps").read_text()
            assert "memfd:glowplug" not in maps, "and its memory is"
        assert "error" not in frame, frame
        text += "".join(one["text"] for one in frame["choices"])
        usage = frame["usage"] or usage
    assert text == whole["choices"][0]["text"]
    assert usage == whole["usage"]
    assert first.wait() == 0, first.output()
    events = eventually(lambda: [event for event in agent.client.events() if event.kind == "handoff"])
    assert "moved from" in events[0].text, events
