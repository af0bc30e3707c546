"""Owns where a worker's generations run: in its own engine or, once it drains, in another worker's.

    answers ──► LiveEngine ──► own engine            streams here
                     └──redirect──► Relay            new ones, and those that were moved

An answer reads a `LiveStream` to its end and does not learn that, in the middle, the tokens came from elsewhere: when
its generation has been moved, the engine's stream ends with "moved", and the one that goes on takes its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.engine.base import Engine, EngineStats, GenerationRequest, GenerationState, TokenEvent, TokenStream
from runtime.errors import Moved

_WAIT = 15.0


class LiveStream:
    """One generation, wherever it runs. One reader; `attach` and `close` may come from any thread."""

    def __init__(
        self, request: GenerationRequest, inner: TokenStream, ended: Callable[[LiveStream], None], *, here: bool
    ) -> None:
        """`here`: the own engine makes these tokens. `ended` is called once nothing more comes."""
        self.request, self.request_id = request, request.id
        self.here = here
        self._lock = threading.Lock()
        self._inner = inner
        self._next: TokenStream | None = None
        self._ended = ended
        self._over = self._closed = False

    def attach(self, successor: TokenStream, *, here: bool = False) -> None:
        """What follows after the present stream has ended with "moved"; `here`: the own engine makes it."""
        with self._lock:
            self.here = here
            self._next, closed = successor, self._closed
        if closed:
            successor.close()

    def reads(self, inner: TokenStream) -> bool:
        with self._lock:
            return inner in (self._inner, self._next)

    def next(self, timeout: float) -> TokenEvent | None:
        if self._over:
            raise StopIteration
        event = self._inner.next(timeout)
        if event is None or event.finish is None:
            return event
        with self._lock:
            if event.finish == "moved" and self._next is not None:
                self._inner, self._next = self._next, None
                return None
            self._over = True
        self._ended(self)
        return event

    def __iter__(self) -> LiveStream:
        return self

    def __next__(self) -> TokenEvent:
        while (event := self.next(_WAIT)) is None:
            pass
        return event

    def close(self) -> None:
        with self._lock:
            self._over = self._closed = True
            inner, successor = self._inner, self._next
        inner.close()
        if successor is not None:
            successor.close()
        self._ended(self)


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
        self._streams: dict[str, LiveStream] = {}
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

    def submit(self, request: GenerationRequest) -> TokenStream:
        return self._begin(request, lambda own: own.submit(request), lambda other: other.begin(request))

    def admit(self, state: GenerationState) -> TokenStream:
        return self._begin(state.request, lambda own: own.admit(state), lambda other: other.admit(state))

    def _begin(
        self,
        request: GenerationRequest,
        here: Callable[[Engine], TokenStream],
        there: Callable[[Elsewhere], TokenStream],
    ) -> TokenStream:
        with self._lock:
            if (other := self._elsewhere) is None:
                return self._entered(request, here(self._owned()), here=True)
        inner = there(other)
        with self._lock:
            return self._entered(request, inner, here=False)

    def _entered(self, request: GenerationRequest, inner: TokenStream, *, here: bool) -> LiveStream:
        stream = self._streams[request.id] = LiveStream(request, inner, self._forget, here=here)
        return stream

    def cancel(self, request_id: str) -> None:
        with self._lock:
            stream = self._streams.get(request_id)
            own, other = self._own, self._elsewhere
        if stream is None:
            return
        if not stream.here and other is not None:
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

    def here(self) -> list[LiveStream]:
        """The generations that the own engine runs."""
        with self._lock:
            return [stream for stream in self._streams.values() if stream.here]

    def reader(self, inner: TokenStream) -> LiveStream | None:
        """Where the tokens of another worker's stream are read; None when nobody does any more."""
        with self._lock:
            stream = self._streams.get(inner.request_id)
            return stream if stream is not None and stream.reads(inner) else None

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

    def _forget(self, stream: LiveStream) -> None:
        with self._lock:
            if self._streams.get(stream.request_id) is stream:
                del self._streams[stream.request_id]
