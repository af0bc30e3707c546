"""Answers of handlers that return `generate(stream=True)` as it is: kept while they run, and gone on with.

A handler that does more with its stream is not called again in the middle of it; its events have no ids, and nothing
of them is kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from runtime.errors import RequestGone
from runtime.function.model import Model, TextStream
from runtime.resume.answer import Answer
from runtime.resume.record import AnswerContext
from runtime.resume.resumption import ResumeQuery, resume_request
from runtime.resume.sessions import Sessions

PREFIX = "gen"


def keeper(sessions: Sessions, wanted: ResumeQuery) -> Callable[[TextStream], None]:
    """What is done with a stream that a handler returned."""

    def keep(text: TextStream) -> None:
        if not text.usage.completion_tokens and text.finish_reason is None:
            context = AnswerContext("handler", wanted.id or f"{PREFIX}-{secrets.token_hex(12)}", 0, wanted.digest)
            session = sessions.open(context, [text.request])
            text.kept(context.id, Answer.of(text.request, text.tokens).keep(session, 0))

    return keep


def resumed(sessions: Sessions, model: Model, wanted: ResumeQuery) -> TextStream | None:
    """Return the rest of a stream that a handler returned; None when the handler is to be called.

    Raises what `resume_request` does, and `RequestGone`.
    """
    if not wanted.id:
        return None
    found = resume_request(sessions, model, wanted, "handler")
    if found is None:
        if wanted.position:
            raise RequestGone("nothing is kept of this request any more; send it anew, without Last-Event-ID")
        return None
    (answer,) = found.answers
    return TextStream(answer, answer.request, told=found.sent_tokens[0], kept_as=found.context.id)
