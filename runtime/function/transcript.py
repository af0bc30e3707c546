"""Opens sessions for handlers that return `generate(stream=True)` as it is, and resumes their answers.

An answer of a handler that does more with its stream cannot be resumed in the middle: its events have no ids, and there
is no session for it.
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


def sink(sessions: Sessions, wanted: ResumeQuery) -> Callable[[TextStream], None]:
    """Return a function that opens a session for a stream that a handler returned, unless the stream was read from."""

    def open_session(text: TextStream) -> None:
        if not text.usage.completion_tokens and text.finish_reason is None:
            context = AnswerContext("handler", wanted.id or f"{PREFIX}-{secrets.token_hex(12)}", 0, wanted.digest)
            session = sessions.open(context, [text.request])
            text.in_session(context.id, Answer.of(text.request, text.tokens).keep(session, 0))

    return open_session


def resumed(sessions: Sessions, model: Model, wanted: ResumeQuery) -> TextStream | None:
    """Return the rest of a stream that a handler returned; None when the handler is to be called.

    Raises `RequestGone`, and the errors of `resume_request`.
    """
    if not wanted.id:
        return None
    found = resume_request(sessions, model, wanted, "handler")
    if found is None:
        if wanted.position:
            raise RequestGone("nothing is kept of this request any more; send it anew, without Last-Event-ID")
        return None
    (answer,) = found.answers
    return TextStream(answer, answer.request, sent=found.sent_tokens[0], session_id=found.context.id)
