"""A session: one request of this worker that is kept, its tokens, and the worker's right to send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cache_agent.snapshots.store import Key
from runtime.engine.base import GenerationRequest, TokenEvent
from runtime.resume.record import AnswerContext


class SessionStore(Protocol):
    """The `Sessions` that a session belongs to, which permits its tokens and records them at the agent."""

    def record(self, session: Session, choice: int, event: TokenEvent) -> bool: ...

    def let_go(self, session: Session, why: str) -> None: ...


class Session:
    """One request that this worker answers. Its `Sessions` guards all attributes with one lock."""

    def __init__(
        self,
        sessions: SessionStore,
        key: Key,
        epoch: int,
        context: AnswerContext,
        requests: Sequence[GenerationRequest],
        tokens: Sequence[Sequence[int]] = (),
        at: int = 0,
        until: float = 0.0,
    ) -> None:
        """`tokens` of each choice are known already; the store has `at` pieces, and its lease on the request runs
        `until` (of time.monotonic)."""
        self.key, self.epoch, self.context = key, epoch, context
        self.requests = tuple(requests)
        self.tokens = [list(ids) for ids in tokens] or [[] for _ in requests]
        self.stored = [len(ids) for ids in self.tokens]  # tokens of each choice that the store has
        self.cut = bool(at)  # the store may have tokens beyond `tokens`, which the next step removes
        self.at, self.until = at, until
        self.over = ""  # the reason why no more tokens may be sent
        self.ended: set[int] = set()  # choices that are complete
        self.free = False  # the next step gives the lease up
        self.frozen = False  # in migration: the store hears nothing of the request
        self.handed = ""  # the worker that owns the request now, under `epoch`; its tokens come through a relay
        self.asked = False  # a reader waits for the store's answer
        self.begun = self.answered = 0  # numbers of exchanges with the store about this request
        self.retry_at = 0.0
        self.renew_only = False  # the record has become too large: only the lease is renewed
        self.unkept = False  # the store has nothing of the request and will have nothing
        self.closed_at = 0.0
        self._sessions = sessions

    @property
    def complete(self) -> bool:
        """Return whether every choice has ended."""
        return len(self.ended) == len(self.requests)

    def record(self, choice: int, event: TokenEvent) -> bool:
        """Record an event before the client gets it; False if the client must not get it."""
        return self._sessions.record(self, choice, event)

    def let_go(self, why: str) -> None:
        """Send no more tokens and give the lease up; does nothing once the session is complete or over."""
        self._sessions.let_go(self, why)
