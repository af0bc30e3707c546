"""Owns a running answer: the tokens of one generation for one reader, wherever they come from.

    record ──"moved"──► own engine ──"moved"──► another worker ──"moved"──► … ──► finish
      └── feeds, one after the other: each begins with the token after the last one of the feed before

A feed is what has tokens for it: the own engine's stream, a relay's from another worker, or what was recorded of the
answer before (`recorded`). The reader meets one object and does not learn which feed a token came from. An answer that
is kept tells its session each token before the reader gets it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from runtime.engine.base import Engine, GenerationRequest, GenerationState, TokenEvent, TokenStream
from runtime.engine.stream import Stream
from runtime.resume.session import Session

_WAIT = 15.0


class Answer:
    """One generation, see `TokenStream`. One reader; `attach` and `close` may come from any thread."""

    def __init__(
        self,
        request: GenerationRequest,
        feed: TokenStream,
        *,
        here: bool = True,
        ended: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        """`here`: the own engine makes the tokens of the last feed. `ended` is called once nothing more comes."""
        self.request, self.request_id = request, request.id
        self.here = here
        self._lock = threading.Lock()
        self._feed = feed  # the one that is read now
        self._further: deque[TokenStream] = deque()
        self._ended = ended
        self._session: Session | None = None
        self._choice = 0
        self._skip = 0
        self._over = False

    @classmethod
    def of(cls, request: GenerationRequest, stream: TokenStream) -> Answer:
        """`stream` where it is an answer already, as a `LiveEngine`'s is."""
        return stream if isinstance(stream, Answer) else cls(request, stream)

    @classmethod
    def begun(cls, engine: Engine, state: GenerationState) -> Answer:
        """A generation that goes on in `engine`, or begins there. Raises what `Engine.admit` and `submit` do."""
        new = not (state.generated or state.kv)
        return cls.of(state.request, engine.submit(state.request) if new else engine.admit(state))

    def keep(self, session: Session, choice: int) -> Answer:
        """From here on nothing is told but under this session, as this choice of it. Before the first is read."""
        self._session, self._choice = session, choice
        return self

    def resume(self, events: Sequence[TokenEvent], told: int) -> Answer:
        """Tells `events` first, and nothing that comes before token number `told`. Before the first is read."""
        seam = TokenEvent(told + len(events), None, "", "moved")
        with self._lock:
            self._further.appendleft(self._feed)
            self._feed, self._skip = recorded(self.request_id, [*events, seam]), told
        return self

    def attach(self, successor: TokenStream, *, here: bool = False) -> None:
        """What follows after the last feed so far has ended with "moved"; `here`: the own engine makes it."""
        with self._lock:
            self.here = here
            self._further.append(successor)
            over = self._over
        if over:
            successor.close()

    def reads(self, feed: TokenStream) -> bool:
        with self._lock:
            return feed is self._feed or feed in self._further

    def next(self, timeout: float) -> TokenEvent | None:
        if self._over:
            raise StopIteration
        event, session = self._feed.next(timeout), self._session
        if event is None:
            return self._stopped(session) if session is not None and session.over else None
        if event.finish is not None and self._goes_on(event):
            return None
        if session is not None and not session.tell(self._choice, event):
            return self._stopped(session)
        if event.index >= self._skip:
            return event
        return replace(event, token=None, text="", logprobs=None) if event.finish is not None else None

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> TokenEvent:
        while (event := self.next(_WAIT)) is None:
            pass
        return event

    def close(self) -> None:
        self._shut()
        if self._session is not None:
            self._session.let_go("its client left")

    def _goes_on(self, last: TokenEvent) -> bool:
        """After the last event of a feed: whether another feed follows."""
        with self._lock:
            if last.finish == "moved" and self._further:
                self._feed = self._further.popleft()
                return True
            self._over = True
        self._ended(self)
        return False

    def _stopped(self, session: Session) -> TokenEvent:
        """The end of an answer whose session another worker has."""
        self._shut()
        why = f"this answer goes on elsewhere ({session.over})"
        return TokenEvent(len(session.tokens[self._choice]), None, "", "moved", why)

    def _shut(self) -> None:
        with self._lock:
            self._over = True
            feeds = [self._feed, *self._further]
        for feed in feeds:
            feed.close()
        self._ended(self)


def recorded(request_id: str, events: Sequence[TokenEvent]) -> Stream:
    """A feed of what is there already."""
    stream = Stream(request_id, lambda: None)
    for event in events:
        stream.put(event)
    return stream
