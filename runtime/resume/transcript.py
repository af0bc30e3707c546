"""Answers of handlers that return `generate(stream=True)` as it is: kept while they run, and gone on with.

A handler that does more with its stream is not called again in the middle of it; its events have no ids, and nothing
of them is kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from runtime.errors import RequestGone
from runtime.function.model import Model, TextStream
from runtime.resume.checkpoint import Checkpoints
from runtime.resume.record import Context
from runtime.resume.resume import Asked, take_up

PREFIX = "gen"


def keeper(book: Checkpoints, wanted: Asked) -> Callable[[TextStream], None]:
    """What is done with a stream that a handler returned."""

    def keep(text: TextStream) -> None:
        if text.request is not None and not text.usage.completion_tokens and text.finish_reason is None:
            context = Context("handler", wanted.id or f"{PREFIX}-{secrets.token_hex(12)}", 0, wanted.digest)
            hold = book.open(context, [text.request])
            text.held(context.id, lambda tokens: hold.stream(0, tokens))

    return keep


def resumed(book: Checkpoints, model: Model, wanted: Asked) -> TextStream | None:
    """The rest of a stream that a handler returned; None when the handler is to be called. Raises what `take_up` does,
    and `RequestGone`."""
    if not wanted.id:
        return None
    found = take_up(book, model, wanted, "handler")
    if found is None:
        if wanted.position:
            raise RequestGone("nothing is kept of this request any more; send it anew, without Last-Event-ID")
        return None
    stream = found.streams[0]
    assert stream is not None, "a handler's stream has no end of its own in its ids"
    text = TextStream(stream, len(found.requests[0].prompt), found.requests[0], told=found.told[0])
    text.held(found.context.id, lambda tokens: tokens)
    return text
