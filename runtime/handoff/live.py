"""Owns where a worker's generations run: in its own engine or, once it drains, in another worker's.

    readers ──► LiveEngine ──► own engine            feeds of what runs here
                     └──redirect──► Relay            new ones, and those that were moved

Each generation is an `Answer`. Its feed is the own engine's stream or, once the generation has been moved, a relay's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.engine.base import Engine, EngineStats, GenerationRequest, GenerationState, TokenStream
from runtime.errors import Moved
from runtime.resume.answer import Answer


class Elsewhere(Protocol):
    """Another worker's engine, as far as answers need it."""

    def begin(self, request: GenerationRequest) -> TokenStream:
        """Raises `EngineBusy`, `BadRequest`, `Moved`."""
        ...

    def admit(self, state: GenerationState) -> TokenStream: ...

    def cancel(self, request_id: str) -> None: ...

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]: ...

    def stats(self) -> EngineStats: ...


class LiveEngine:
    """The engine that answers talk to; see `Engine`. Any thread."""

    def __init__(self, engine: Engine) -> None:
        self.kind, self.context_length = engine.kind, engine.context_length
        self.arithmetic = str(getattr(engine, "arithmetic", ""))
        self._revision = engine.revision
        self._stats = engine.stats()
        self._lock = threading.Lock()
        self._own: Engine | None = engine
        self._elsewhere: Elsewhere | None = None
        self._answers: dict[str, Answer] = {}
        self._embedding = 0  # calls of it that are in the own engine

    @property
    def revision(self) -> str:
        return self._revision

    @revision.setter
    def revision(self, revision: str) -> None:
        self._revision = revision
        if (own := self._own) is not None:
            own.revision = revision

    # --- what answers ask -------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Answer:
        return self._begin(request, lambda own: own.submit(request), lambda other: other.begin(request))

    def admit(self, state: GenerationState) -> Answer:
        return self._begin(state.request, lambda own: own.admit(state), lambda other: other.admit(state))

    def _begin(
        self,
        request: GenerationRequest,
        here: Callable[[Engine], TokenStream],
        there: Callable[[Elsewhere], TokenStream],
    ) -> Answer:
        with self._lock:
            if (other := self._elsewhere) is None:
                return self._entered(request, here(self._owned()), here=True)
        feed = there(other)
        with self._lock:
            return self._entered(request, feed, here=False)

    def _entered(self, request: GenerationRequest, feed: TokenStream, *, here: bool) -> Answer:
        answer = self._answers[request.id] = Answer(request, feed, here=here, ended=self._forget)
        return answer

    def cancel(self, request_id: str) -> None:
        with self._lock:
            answer = self._answers.get(request_id)
            own, other = self._own, self._elsewhere
        if answer is None:
            return
        if not answer.here and other is not None:
            other.cancel(request_id)
        elif own is not None:
            own.cancel(request_id)

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        with self._lock:
            if (other := self._elsewhere) is None:
                own = self._owned()
                self._embedding += 1
        if other is not None:
            return other.embed(prompts)
        try:
            return own.embed(prompts)
        finally:
            with self._lock:
                self._embedding -= 1

    def stats(self) -> EngineStats:
        with self._lock:
            own, other = self._own, self._elsewhere
        return other.stats() if other is not None else own.stats() if own is not None else self._stats

    # --- the own engine's -------------------------------------------------------------------------------------------

    def export(self, request_id: str, *, kv: bool = True) -> GenerationState:
        if (own := self._own) is None:
            raise KeyError(request_id)
        return own.export(request_id, kv=kv)

    def readmit(self, state: GenerationState) -> TokenStream:
        """For a stream that is there already: its tokens from the own engine. Raises what `admit` does, and `Moved`."""
        with self._lock:
            return self._owned().admit(state) if state.generated else self._owned().submit(state.request)

    def resume(self, request_id: str) -> None:
        if (own := self._own) is not None:
            own.resume(request_id)

    def forget(self, request_id: str) -> None:
        if (own := self._own) is not None:
            own.forget(request_id)

    def recompute(self, request_id: str) -> tuple[int, float]:
        """Bytes of a generation's rows, and about how many seconds feeding it again would take; 0 for not known."""
        measure: Callable[[str], tuple[int, float]] | None = getattr(self._own, "recompute", None)
        return measure(request_id) if measure is not None else (0, 0.0)

    def close(self) -> None:
        if (own := self._own) is not None:
            own.close()

    # --- what moves generations uses --------------------------------------------------------------------------------

    def redirect(self, other: Elsewhere | None) -> None:
        """Where new generations begin from here on; None: in the own engine, if it is still there."""
        with self._lock:
            self._elsewhere = other

    def here(self) -> list[Answer]:
        """The generations that the own engine runs."""
        with self._lock:
            return [answer for answer in self._answers.values() if answer.here]

    def reader(self, feed: TokenStream) -> Answer | None:
        """The answer that another worker's tokens belong to; None when its reader has left."""
        with self._lock:
            answer = self._answers.get(feed.request_id)
            return answer if answer is not None and answer.reads(feed) else None

    def release(self) -> bool:
        """Gives the own engine up, with all that it holds; False while it still runs something."""
        with self._lock:
            if self._elsewhere is None or self._embedding:
                return False
            if (own := self._own) is not None:
                stats = own.stats()
                if stats.running or stats.waiting:  # of what has ended all events are out, though not all are read
                    return False
                self._own, self._stats = None, stats
        if own is not None:
            own.close()
        return True

    @property
    def released(self) -> bool:
        return self._own is None

    def _owned(self) -> Engine:
        if (found := self._own) is None:
            raise Moved("this replica has handed its work over and ends; send the request again, it finds another one")
        return found

    def _forget(self, answer: Answer) -> None:
        with self._lock:
            if self._answers.get(answer.request_id) is answer:
                del self._answers[answer.request_id]
