"""The place where a worker's generations run: in its engine or, once it drains, in another worker's.

    readers ──► LiveEngine ──► this worker's engine      feeds of generations that run here
                     └──redirect──► Relay                feeds of new generations, and of those that were moved

Each generation is an `Answer`. Its feed is this worker's engine's stream or, after its migration, a relay's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.engine.base import Engine, EngineStats, GenerationRequest, GenerationState, TokenStream
from runtime.errors import Moved
from runtime.resume.answer import Answer


class RemoteEngine(Protocol):
    """Another worker's engine, as far as answers use it."""

    def begin(self, request: GenerationRequest) -> TokenStream:
        """Begin a generation there. Raises `EngineBusy`, `BadRequest`, `Moved`."""
        ...

    def admit(self, state: GenerationState) -> TokenStream: ...

    def cancel(self, request_id: str) -> None: ...

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]: ...

    def stats(self) -> EngineStats: ...


class LiveEngine:
    """An `Engine` whose generations can move to another worker. Any thread."""

    def __init__(self, engine: Engine) -> None:
        self.kind, self.context_length = engine.kind, engine.context_length
        self.arithmetic = str(getattr(engine, "arithmetic", ""))
        self._revision = engine.revision
        self._stats = engine.stats()
        self._lock = threading.Lock()
        self._engine: Engine | None = engine
        self._remote: RemoteEngine | None = None
        self._answers: dict[str, Answer] = {}
        self._embedding = 0  # calls of `embed` that run in this worker's engine

    @property
    def revision(self) -> str:
        return self._revision

    @revision.setter
    def revision(self, revision: str) -> None:
        self._revision = revision
        if (engine := self._engine) is not None:
            engine.revision = revision

    # --- for answers ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Answer:
        return self._begin(request, lambda engine: engine.submit(request), lambda remote: remote.begin(request))

    def admit(self, state: GenerationState) -> Answer:
        return self._begin(state.request, lambda engine: engine.admit(state), lambda remote: remote.admit(state))

    def _begin(
        self,
        request: GenerationRequest,
        here: Callable[[Engine], TokenStream],
        there: Callable[[RemoteEngine], TokenStream],
    ) -> Answer:
        with self._lock:
            if (remote := self._remote) is None:
                return self._entered(request, here(self._present_engine()), here=True)
        feed = there(remote)
        with self._lock:
            return self._entered(request, feed, here=False)

    def _entered(self, request: GenerationRequest, feed: TokenStream, *, here: bool) -> Answer:
        answer = self._answers[request.id] = Answer(request, feed, here=here, ended=self._forget)
        return answer

    def cancel(self, request_id: str) -> None:
        with self._lock:
            answer = self._answers.get(request_id)
            engine, remote = self._engine, self._remote
        if answer is None:
            return
        if not answer.here and remote is not None:
            remote.cancel(request_id)
        elif engine is not None:
            engine.cancel(request_id)

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        with self._lock:
            if (remote := self._remote) is None:
                engine = self._present_engine()
                self._embedding += 1
        if remote is not None:
            return remote.embed(prompts)
        try:
            return engine.embed(prompts)
        finally:
            with self._lock:
                self._embedding -= 1

    def stats(self) -> EngineStats:
        with self._lock:
            engine, remote = self._engine, self._remote
        return remote.stats() if remote is not None else engine.stats() if engine is not None else self._stats

    # --- this worker's engine ---------------------------------------------------------------------------------------

    def export(self, request_id: str, *, kv: bool = True) -> GenerationState:
        if (engine := self._engine) is None:
            raise KeyError(request_id)
        return engine.export(request_id, kv=kv)

    def readmit(self, state: GenerationState) -> TokenStream:
        """Return a feed from this worker's engine for an answer that exists. Raises what `admit` does, and `Moved`."""
        with self._lock:
            return (
                self._present_engine().admit(state) if state.generated else self._present_engine().submit(state.request)
            )

    def resume(self, request_id: str) -> None:
        if (engine := self._engine) is not None:
            engine.resume(request_id)

    def forget(self, request_id: str) -> None:
        if (engine := self._engine) is not None:
            engine.forget(request_id)

    def recompute(self, request_id: str) -> tuple[int, float]:
        """Return the bytes of a generation's rows, and the estimated seconds of computing them again; 0: not known."""
        measure: Callable[[str], tuple[int, float]] | None = getattr(self._engine, "recompute", None)
        return measure(request_id) if measure is not None else (0, 0.0)

    def close(self) -> None:
        if (engine := self._engine) is not None:
            engine.close()

    # --- for hand-offs ----------------------------------------------------------------------------------------------

    def redirect(self, remote: RemoteEngine | None) -> None:
        """Set where new generations begin; None: in this worker's engine, if it has not been released."""
        with self._lock:
            self._remote = remote

    def here(self) -> list[Answer]:
        """Return the generations that this worker's engine runs."""
        with self._lock:
            return [answer for answer in self._answers.values() if answer.here]

    def reader(self, feed: TokenStream) -> Answer | None:
        """Return the answer that reads this feed; None when its reader has left."""
        with self._lock:
            answer = self._answers.get(feed.request_id)
            return answer if answer is not None and answer.reads(feed) else None

    def release(self) -> bool:
        """Close this worker's engine, with all that it holds; False while it still runs something."""
        with self._lock:
            if self._remote is None or self._embedding:
                return False
            if (engine := self._engine) is not None:
                stats = engine.stats()
                if stats.running or stats.waiting:  # after the end of a generation all its events are in its stream
                    return False
                self._engine, self._stats = None, stats
        if engine is not None:
            engine.close()
        return True

    @property
    def released(self) -> bool:
        return self._engine is None

    def _present_engine(self) -> Engine:
        if (found := self._engine) is None:
            raise Moved("this replica has handed its work over and ends; send the request again, it finds another one")
        return found

    def _forget(self, answer: Answer) -> None:
        with self._lock:
            if self._answers.get(answer.request_id) is answer:
                del self._answers[answer.request_id]
