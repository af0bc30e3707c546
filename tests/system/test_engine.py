"""What only a real function shows of its engine: it starts anew after a fault, and says which engine it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

FRAGILE = """
    import os

    def handle(event, context):
        if event.path == "/break":
            def fault(rows):
                raise SystemError("a fault of the engine")
            context.model.engine.choose = fault
        return {"body": {"pid": os.getpid(), "text": context.model.generate("a b", max_tokens=4, temperature=0)}}
    """


def test_a_broken_engine_fails_its_requests_and_the_next_worker_serves(
    started: Callable[..., Any], checkpoint: Path
) -> None:
    function = started(handler=FRAGILE, model=checkpoint).wait_ready()
    first = function.request("/").json
    broken = function.request("/break")
    assert broken.status == 500
    assert broken.code == "engine_failed"
    assert "SystemError" in broken.json["error"]["message"]

    def served_again() -> Any:
        answer = function.request("/")
        return answer.status == 200 and answer.json["pid"] != first["pid"] and answer.json

    assert function.until(served_again, "another worker serves")["text"] == first["text"]
    assert "[engine_failed]" in function.output()


def test_the_ledger_says_which_engine_serves(started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(model=checkpoint).wait_ready()
    names = [span["name"] for span in function.request("/_/ledger").json["spans"]]
    assert "engine" in names
