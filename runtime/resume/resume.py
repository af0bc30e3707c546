"""Goes on with a request that was kept: here, with the tokens that stand, from where its client is.

    claim ──► record ──► check ──► tokens that stand, told again from the client's place on ──► the engine's next ones

Tokens that the client has not seen and that are kept are replayed from their ids, text and all; the engine feeds them
to the model as they were made and makes the next. What the client has seen and was not kept any more is generated
again and not told. Log-probabilities are not kept: a request for them is gone on with from where its client is.
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

PATIENCE = 10.0  # seconds that a client waits for whoever has its request, and for a slot
_LOOK = 0.05
_MOST_KEY = 255


@dataclass(frozen=True, slots=True)
class ResumeQuery:
    """What a request says about being gone on with: its id ("" if it names none), the client's place, and what makes
    it the same request: the digest of its path and body."""

    id: str
    position: Position | None
    digest: str


def asked(headers: Mapping[str, str], prefix: str, path: str, body: bytes) -> ResumeQuery:
    """`prefix` begins the ids of this route. Raises `BadRequest` for headers that say nothing."""
    digest = hashlib.blake2b(path.encode() + b"\0" + body, digest_size=16).hexdigest()
    if last := headers.get("Last-Event-ID", ""):
        place = positions.parse(last)
        if place is None or not place.id.startswith(f"{prefix}-"):
            raise BadRequest("Last-Event-ID is no event of this route; send the one of the last event", "Last-Event-ID")
        return ResumeQuery(place.id, place, digest)
    if key := headers.get("Idempotency-Key", ""):
        if len(key) > _MOST_KEY:
            raise BadRequest(f"Idempotency-Key has {len(key)} characters; at most {_MOST_KEY}", "Idempotency-Key")
        # Another caller's key is another key, as far as the function can tell callers apart.
        whose = f"{headers.get('Authorization', '')}\0{key}".encode(errors="surrogateescape")
        return ResumeQuery(f"{prefix}-{hashlib.blake2b(whose, digest_size=16).hexdigest()}", None, digest)
    return ResumeQuery("", None, digest)


def asked_of_handler(headers: Mapping[str, str], path: str, body: bytes) -> ResumeQuery:
    """Ids that are not ours are the handler's own business."""
    mine = positions.parse(headers.get("Last-Event-ID", ""))
    own = {name: headers[name] for name in ("Authorization", "Idempotency-Key") if name in headers}
    return asked(own | ({"Last-Event-ID": str(mine)} if mine else {}), "gen", path, body)


class Continuing(Protocol):
    """What of a model is needed to go on."""

    engine: Engine
    codec: Codec


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A request that goes on: of each choice its answer (nothing but an end where that was told before), and the tokens
    and characters that were told."""

    context: AnswerContext
    answers: tuple[Answer, ...]
    told: tuple[int, ...]
    said: tuple[int, ...]
    ended: tuple[bool, ...]
    usage_told: bool


def take_up(sessions: Sessions, model: Continuing, wanted: ResumeQuery, route: Route) -> TakenUp | None:
    """None when nothing is kept of it. Raises `Moved` while another has it, `BadRequest` when it is another request,

    `SnapshotRefused`, `EngineBusy`.
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
        _same(found, wanted, route)
        for choice in found.choices:
            snapshot.check(choice, sessions.place())
        return _go_on(sessions, model, claimed, since, found, wanted.position, deadline)
    except BaseException:
        if claimed.outcome == "taken":
            sessions.give_up(wanted.id, claimed)
        raise


def _same(found: Record, wanted: ResumeQuery, route: Route) -> None:
    if (found.context.asked, found.context.route) != (wanted.digest, route):
        header = "Last-Event-ID" if wanted.position else "Idempotency-Key"
        raise BadRequest(
            f"this {header} is of another request; send the same path and body again, or a new one", header
        )
    if wanted.position and len(wanted.position.told) != len(found.choices):
        raise BadRequest("Last-Event-ID has another number of choices than the request", "Last-Event-ID")


def _go_on(
    sessions: Sessions,
    model: Continuing,
    claimed: Claimed,
    since: float,
    found: Record,
    place: Position | None,
    deadline: float,
) -> TakenUp:
    count = len(found.choices)
    told = place.told if place else (0,) * count
    ended = place.ended if place else (False,) * count
    told_again = [_replayed(choice.state.request, choice.state.generated, model.codec) for choice in found.choices]
    histories = [
        events[: told[n]] if found.choices[n].state.request.logprobs is not None and not ended[n] else events
        for n, events in enumerate(told_again)
    ]
    session = None
    if claimed.outcome == "taken":
        tokens = [[event.token for event in events if event.token is not None] for events in histories]
        session = sessions.go_on(claimed, found, tokens, since)
        session.ended |= {n for n, end in enumerate(ended) if end}
    answers: list[Answer] = []
    try:
        for n, events in enumerate(histories):
            request = found.choices[n].state.request
            if ended[n]:
                answers.append(Answer(request, recorded(request.id, [TokenEvent(told[n], None, "", "stop")])))
                continue
            answers.append(_continued(model.engine, found.choices[n], events, told[n], deadline))
            if session:
                answers[n].keep(session, n)
    except BaseException:
        for begun in answers:
            begun.close()
        if session:
            session.let_go("it could not be gone on with here")
        raise
    said = tuple(sum(len(event.text) for event in events[: told[n]]) for n, events in enumerate(histories))
    return TakenUp(found.context, tuple(answers), told, said, ended, bool(place and place.usage))


def _replayed(request: GenerationRequest, tokens: Sequence[int], codec: Codec) -> list[TokenEvent]:
    """The events that these tokens made."""
    generation = Generation(request, codec)
    events = []
    for token in tokens:
        events.append(generation.advance(token))
        if generation.finished:
            break
    return events


def _continued(
    engine: Engine, kept: snapshot.Snapshot, events: Sequence[TokenEvent], told: int, deadline: float
) -> Answer:
    request = kept.state.request
    if events and events[-1].finish is not None:
        rest = events[told:] or [TokenEvent(len(events), None, "", events[-1].finish)]
        return Answer(request, recorded(request.id, rest))
    engine.cancel(request.id)  # a connection that this client gave up, and that does not know it yet
    tokens = tuple(event.token for event in events if event.token is not None)
    emitted = sum(len(event.text) for event in events)
    state = replace(kept.state, generated=tokens, emitted=emitted)
    return _with_patience(lambda: Answer.begun(engine, state), deadline).resume(events[told:], told)


def _with_patience(begin: Callable[[], Answer], deadline: float) -> Answer:
    while True:
        try:
            return begin()
        except EngineBusy:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOOK)
