"""A running answer: the tokens of one generation for one reader, from one feed after the other.

    record ──"moved"──► this engine ──"moved"──► another worker ──"moved"──► … ──► finish
      └── feeds: each begins with the token after the last one of the feed before

A feed is a stream of tokens: this worker's engine's, a relay's from another worker, or the recorded beginning of the
answer (`recorded`). The reader does not learn which feed a token came from. The answer of a request that is kept
records each token in its session before the reader gets the token.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from runtime.engine.base import Engine, GenerationRequest, GenerationState, TokenEvent, TokenStream
from runtime.engine.stream import Stream
from runtime.resume.session import Session

_WAIT = 15.0  # seconds of one wait for a token; waits repeat without end


class Answer:
    """One generation, as a `TokenStream` for one reader. `attach` and `close` may be called from any thread."""

    def __init__(
        self,
        request: GenerationRequest,
        feed: TokenStream,
        *,
        here: bool = True,
        ended: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        """`here`: this worker's engine makes the last feed's tokens. `ended` is called after the last event."""
        self.request, self.request_id = request, request.id
        self.here = here
        self._lock = threading.Lock()
        self._feed = feed  # read now; `_further` follow
        self._further: deque[TokenStream] = deque()
        self._ended = ended
        self._session: Session | None = None
        self._choice = 0
        self._skip = 0  # tokens that the reader has from an earlier connection
        self._over = False

    @classmethod
    def of(cls, request: GenerationRequest, stream: TokenStream) -> Answer:
        """Return `stream` itself if it is an answer, as a `LiveEngine`'s is, or an answer that reads it."""
        return stream if isinstance(stream, Answer) else cls(request, stream)

    @classmethod
    def begun(cls, engine: Engine, state: GenerationState) -> Answer:
        """Continue a generation in `engine`, or begin it there. Raises what `Engine.admit` and `submit` do."""
        new = not (state.generated or state.kv)
        return cls.of(state.request, engine.submit(state.request) if new else engine.admit(state))

    def keep(self, session: Session, choice: int) -> Answer:
        """Record all tokens in this session, as this choice of its request. Call it before the first read."""
        self._session, self._choice = session, choice
        return self

    def replay(self, events: Sequence[TokenEvent], sent: int) -> Answer:
        """Give `events` first, then no token before number `sent`. Call it before the first read."""
        seam = TokenEvent(sent + len(events), None, "", "moved")
        with self._lock:
            self._further.appendleft(self._feed)
            self._feed, self._skip = recorded(self.request_id, [*events, seam]), sent
        return self

    def attach(self, successor: TokenStream, *, here: bool = False) -> None:
        """Append a feed, which is read after the last one so far ends with "moved".

        `here` says that this worker's engine makes its tokens.
        """
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
        if event.finish is not None and self._next_feed(event):
            return None
        if session is not None and not session.record(self._choice, event):
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

    def _next_feed(self, last: TokenEvent) -> bool:
        """Turn to the next feed after the last event of one; False when the answer is over."""
        with self._lock:
            if last.finish == "moved" and self._further:
                self._feed = self._further.popleft()
                return True
            self._over = True
        self._ended(self)
        return False

    def _stopped(self, session: Session) -> TokenEvent:
        """Return the end of an answer whose session another worker has."""
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
    """Return a feed of these events, without an engine."""
    stream = Stream(request_id, lambda: None)
    for event in events:
        stream.put(event)
    return stream
