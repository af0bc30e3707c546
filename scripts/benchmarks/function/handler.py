"""The function that benchmarks start, for Glowplug; plain.py is the same one without it."""

from collections.abc import Iterator
from typing import Any


def handle(event: Any, context: Any) -> str | Iterator[str]:
    """Continue the body by `?tokens=N` tokens, 1 without it; a GET of /word or /words asks no model."""
    if event.path == "/word":
        return "word"
    if event.path == "/words":
        return iter(("word ", "word"))
    count = int(event.query.get("tokens", 1))
    answer: str | Iterator[str] = context.model.generate(
        event.body.decode(), max_tokens=count, temperature=0, ignore_eos=True
    )
    return answer
