"""Whole functions on one node: one is killed in the middle of an answer, the other one has the rest of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.resume.client import ask


def test_a_killed_functions_answer_is_finished_by_another(
    agent: Any, checkpoint: Path, started: Callable[..., Any], tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("f" * 32)
    settings = {"socket": agent.socket, "checkpoints": "chat", "function_key_file": key}
    first, second = (started(model=checkpoint, **settings) for _ in range(2))
    body = {"prompt": "a glow plug", "max_tokens": 600, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    for function in (first, second):
        function.wait_ready()
    whole = second.request("/v1/completions", body).json
    urls = [f"http://127.0.0.1:{function.port}" for function in (first, second)]
    text, usage = "", None
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    for number, event in enumerate(ask(urls, "/v1/completions", streamed)):
        frame = json.loads(event.data)
        text += "".join(one["text"] for one in frame["choices"])
        usage = frame["usage"] or usage
        if number == 50:  # without a chance to say goodbye
            for pid in first.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            first.process.wait(30)
    assert text == whole["choices"][0]["text"]
    assert usage == whole["usage"]
    for left in first.temporary.iterdir():  # nobody can tidy up after SIGKILL
        left.unlink() if left.is_file() else None
