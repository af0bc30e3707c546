"""Resumption: this worker claims a request that was kept, and continues it from the client's position.

    claim ──► record ──► check ──► recorded tokens, sent again from the client's position on ──► the engine's next ones

Recorded tokens that the client has not seen are replayed from their ids, with their text; the engine feeds them to the
model as they were made and generates the next. Tokens that the client has seen and that were never recorded are
generated again and not sent. Log-probabilities are not recorded: a request for them continues at the client's position.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cache_agent.errors import AgentError
from cache_agent.snapshots.store import Claimed
from runtime.engine.base import Codec, Engine, GenerationRequest, TokenEvent
from runtime.engine.generation import Generation
from runtime.errors import BadRequest, EngineBusy, Moved
from runtime.resume import position as positions
from runtime.resume import snapshot
from runtime.resume.answer import Answer, recorded
from runtime.resume.position import Position
from runtime.resume.record import AnswerContext, Record, Route
from runtime.resume.sessions import Sessions

PATIENCE = 10.0  # seconds that a client waits until the present owner lets go of its request, and for a slot
_LOOK = 0.05
_MOST_KEY = 255


@dataclass(frozen=True, slots=True)
class ResumeQuery:
    """The part of a request that resumption needs: its id ("" if it names none), the client's position in the answer,
    and the digest of path and body, which are the same in every attempt."""

    id: str
    position: Position | None
    digest: str


def request_query(headers: Mapping[str, str], prefix: str, path: str, body: bytes) -> ResumeQuery:
    """Read a request's headers; `prefix` begins the ids of its route. Raises `BadRequest` for malformed headers."""
    digest = hashlib.blake2b(path.encode() + b"\0" + body, digest_size=16).hexdigest()
    if last := headers.get("Last-Event-ID", ""):
        position = positions.parse(last)
        if position is None or not position.id.startswith(f"{prefix}-"):
            raise BadRequest("Last-Event-ID is no event of this route; send the one of the last event", "Last-Event-ID")
        return ResumeQuery(position.id, position, digest)
    if key := headers.get("Idempotency-Key", ""):
        if len(key) > _MOST_KEY:
            raise BadRequest(f"Idempotency-Key has {len(key)} characters; at most {_MOST_KEY}", "Idempotency-Key")
        # The same key of another caller names another request, as far as the function can tell callers apart.
        secret = f"{headers.get('Authorization', '')}\0{key}".encode(errors="surrogateescape")
        return ResumeQuery(f"{prefix}-{hashlib.blake2b(secret, digest_size=16).hexdigest()}", None, digest)
    return ResumeQuery("", None, digest)


def handler_query(headers: Mapping[str, str], path: str, body: bytes) -> ResumeQuery:
    """Like `request_query`, for a handler's route: event ids of another form are the handler's, and pass."""
    position = positions.parse(headers.get("Last-Event-ID", ""))
    named = {name: headers[name] for name in ("Authorization", "Idempotency-Key") if name in headers}
    return request_query(named | ({"Last-Event-ID": str(position)} if position else {}), "gen", path, body)


class ResumingModel(Protocol):
    """The part of a model that resumption uses."""

    engine: Engine
    codec: Codec


@dataclass(frozen=True, slots=True)
class ResumedRequest:
    """A request that this worker continues: per choice its answer (only an end where the client has the end already),
    and the numbers of tokens and characters that the client has."""

    context: AnswerContext
    answers: tuple[Answer, ...]
    sent_tokens: tuple[int, ...]
    sent_characters: tuple[int, ...]
    ended: tuple[bool, ...]
    usage_sent: bool


def resume_request(
    sessions: Sessions, model: ResumingModel, wanted: ResumeQuery, route: Route
) -> ResumedRequest | None:
    """Claim a request and continue it here; None when the store has nothing of it.

    Raises `Moved` while another replica owns the request, `BadRequest` when id and body do not belong together,
    `SnapshotRefused` when this replica differs from the one that began it, `EngineBusy` when no slot gets free.
    """
    deadline = time.monotonic() + PATIENCE
    try:
        claimed, since = sessions.claim(wanted.id, deadline)
    except AgentError as error:
        raise Moved(f"what is kept of this request cannot be had now: {error.text} [{error.code}]") from error
    if claimed.outcome == "absent":
        return None
    if claimed.outcome == "held":
        raise Moved("another replica still answers this request; try again in a moment", claimed.wait)
    try:
        found = sessions.read(claimed, wanted.id)
        _check_same_request(found, wanted, route)
        for choice in found.choices:
            snapshot.check(choice, sessions.identity())
        return _resume_claimed(sessions, model, claimed, since, found, wanted.position, deadline)
    except BaseException:
        if claimed.outcome == "taken":
            sessions.give_up(wanted.id, claimed)
        raise


def _check_same_request(found: Record, wanted: ResumeQuery, route: Route) -> None:
    if (found.context.asked, found.context.route) != (wanted.digest, route):
        header = "Last-Event-ID" if wanted.position else "Idempotency-Key"
        raise BadRequest(
            f"this {header} is of another request; send the same path and body again, or a new one", header
        )
    if wanted.position and len(wanted.position.sent) != len(found.choices):
        raise BadRequest("Last-Event-ID has another number of choices than the request", "Last-Event-ID")


def _resume_claimed(
    sessions: Sessions,
    model: ResumingModel,
    claimed: Claimed,
    since: float,
    found: Record,
    position: Position | None,
    deadline: float,
) -> ResumedRequest:
    count = len(found.choices)
    sent = position.sent if position else (0,) * count
    ended = position.ended if position else (False,) * count
    replayed = [_replayed(choice.state.request, choice.state.generated, model.codec) for choice in found.choices]
    histories = [
        events[: sent[n]] if found.choices[n].state.request.logprobs is not None and not ended[n] else events
        for n, events in enumerate(replayed)
    ]
    session = None
    if claimed.outcome == "taken":
        tokens = [[event.token for event in events if event.token is not None] for events in histories]
        session = sessions.resume(claimed, found, tokens, since)
        session.ended |= {n for n, end in enumerate(ended) if end}
    answers: list[Answer] = []
    try:
        for n, events in enumerate(histories):
            request = found.choices[n].state.request
            if ended[n]:
                answers.append(Answer(request, recorded(request.id, [TokenEvent(sent[n], None, "", "stop")])))
                continue
            answers.append(_continued(model.engine, found.choices[n], events, sent[n], deadline))
            if session:
                answers[n].keep(session, n)
    except BaseException:
        for begun in answers:
            begun.close()
        if session:
            session.let_go("it could not be gone on with here")
        raise
    characters = tuple(sum(len(event.text) for event in events[: sent[n]]) for n, events in enumerate(histories))
    return ResumedRequest(found.context, tuple(answers), sent, characters, ended, bool(position and position.usage))


def _replayed(request: GenerationRequest, tokens: Sequence[int], codec: Codec) -> list[TokenEvent]:
    """Return the events that these tokens made."""
    generation = Generation(request, codec)
    events = []
    for token in tokens:
        events.append(generation.advance(token))
        if generation.finished:
            break
    return events


def _continued(
    engine: Engine, kept: snapshot.Snapshot, events: Sequence[TokenEvent], sent: int, deadline: float
) -> Answer:
    """Return the answer of one choice, of which `events` are recorded and the client has `sent` tokens."""
    request = kept.state.request
    if events and events[-1].finish is not None:
        rest = events[sent:] or [TokenEvent(len(events), None, "", events[-1].finish)]
        return Answer(request, recorded(request.id, rest))
    engine.cancel(request.id)  # the generation of an earlier connection, which may not have noticed its end
    tokens = tuple(event.token for event in events if event.token is not None)
    emitted = sum(len(event.text) for event in events)
    state = replace(kept.state, generated=tokens, emitted=emitted)
    return _with_patience(lambda: Answer.begun(engine, state), deadline).replay(events[sent:], sent)


def _with_patience(begin: Callable[[], Answer], deadline: float) -> Answer:
    while True:
        try:
            return begin()
        except EngineBusy:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOOK)
