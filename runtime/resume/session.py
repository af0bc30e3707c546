"""Owns one request that is kept: what was told of it, and under which right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cache_agent.snapshots.store import Key
from runtime.engine.base import GenerationRequest, TokenEvent
from runtime.resume.record import AnswerContext


class Guard(Protocol):
    """The store that a session belongs to: it decides what may be told, and tells the agent."""

    def tell(self, session: Session, choice: int, event: TokenEvent) -> bool: ...

    def let_go(self, session: Session, why: str) -> None: ...


class Session:
    """One request that this worker answers: what was told of it, and under which right. Its `Sessions` guards it."""

    def __init__(
        self,
        sessions: Guard,
        key: Key,
        epoch: int,
        context: AnswerContext,
        requests: Sequence[GenerationRequest],
        tokens: Sequence[Sequence[int]] = (),
        at: int = 0,
        until: float = 0.0,
    ) -> None:
        """`tokens` of each choice are there already, and so are `at` pieces of it, in a store whose lease on it runs
        `until` then."""
        self.key, self.epoch, self.context = key, epoch, context
        self.requests = tuple(requests)
        self.tokens = [list(ids) for ids in tokens] or [[] for _ in requests]
        self.sent = [len(ids) for ids in self.tokens]
        self.cut = bool(at)  # the store may have more tokens than these
        self.at, self.until = at, until
        self.over = ""  # why nothing more may be told
        self.ended: set[int] = set()
        self.free = False  # nobody's any more, once that is told
        self.frozen = False  # on its way to another worker: nothing is told to the store
        self.handed = ""  # who keeps it now, under `epoch`; that one's tokens are told through these streams
        self.asked = False  # somebody waits for an answer of the store
        self.begun = self.answered = 0  # exchanges about it
        self.retry_at = 0.0
        self.renew_only = False  # it has become too large
        self.unkept = False
        self.closed_at = 0.0
        self._sessions = sessions

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self.requests)

    def tell(self, choice: int, event: TokenEvent) -> bool:
        """Takes down an event that is about to be told; False if it must not be."""
        return self._sessions.tell(self, choice, event)

    def let_go(self, why: str) -> None:
        """Nothing more is told here, and another may claim it; without effect on one that is complete or over."""
        self._sessions.let_go(self, why)
