"""Owns which requests of this worker are kept, and its right to answer them: one thread tells the agent what is new.

    open / claim ──► Hold ──tell… ──► done                                   the record says all that was told
                       │  └─ let_go ──► free                                 anybody may claim it at once
                       ├─ fenced, or wanted by another ──► over              nothing more is told here
                       └─ freeze ──► transfer ──► handed                     another keeps it, and tells through us
                            └─ thaw ──► Hold      └─ transfer ──► retake ──► Hold      … and is gone

A token is told to the client only while the lease on its request runs; the lease begins when a `keep` is sent, not when
its answer comes, so this worker's idea of it ends before the store's. A worker that was stopped and wakes finds it over
and asks before it says another word. A store that cannot be asked, which then lets nobody else take over either, does
not silence a worker. Tokens are told first and kept a little later: what a crash loses of them is generated again.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.snapshots import SnapshotClient
from cache_agent.errors import AgentError
from cache_agent.snapshots.store import Claimed, Keep, Key
from cache_agent.wire.requests import KeptStatus
from runtime.config import FunctionConfig
from runtime.engine.base import GenerationRequest, TokenEvent
from runtime.resume import record
from runtime.resume.record import AnswerContext
from runtime.resume.seal import Seal, seal
from runtime.resume.session import Session
from runtime.resume.snapshot import ReplicaIdentity

log = logging.getLogger("glowplug.checkpoint")

LEASE = 3.0  # seconds for which a `keep` holds a request; as long a client may wait after a crash
_RETELL = 256  # pieces after which a record is told anew, in two
_RETRY = 0.5  # seconds between attempts while the store cannot be asked
_LAST_WORD = 30.0  # seconds for which the end of a request is tried to be told
_EVERY = 16  # tokens of a request after which it is kept again
_STUCK = 15.0  # seconds, upper bound of a wait that the agent's own deadlines end sooner
_LOOK = 0.1  # seconds between two looks at whether another has let go


class Sessions:
    """Any thread. `close` tells what is left to tell."""

    def __init__(
        self,
        client: SnapshotClient,
        space: str,
        seal: Seal,
        place: Callable[[], ReplicaIdentity],
        *,
        owner: str,
        every: int,
        lease: float = LEASE,
    ) -> None:
        """`place` says what this replica is (nothing is kept while its revision is unknown), `every` after how many
        tokens of a request it is kept."""
        self.place = place
        self._client, self._space, self._seal = client, space, seal
        self._owner, self._every, self._lease = owner, every, lease
        self._changed = threading.Condition()
        self._sessions: dict[str, Session] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    # --- what answers use -----------------------------------------------------------------------------------------

    def open(self, context: AnswerContext, requests: Sequence[GenerationRequest]) -> Session:
        """A request that begins here."""
        return self._enter(Session(self, Key(self._space, context.id), 1, context, requests))

    def go_on(self, claimed: Claimed, found: record.Record, tokens: Sequence[Sequence[int]], since: float) -> Session:
        """A request that was claimed at `since`; `tokens` of each choice stand, and what the store has more is cut."""
        requests = [choice.state.request for choice in found.choices]
        key, until = Key(self._space, found.context.id), since + self._lease
        at = len(claimed.pieces)
        return self._enter(Session(self, key, claimed.epoch, found.context, requests, tokens, at, until))

    def claim(self, request_id: str, deadline: float) -> tuple[Claimed, float]:
        """Asks to own a request, and waits for whoever has it now, at most until `deadline`; the outcome, and when it
        was asked for. Raises any `AgentError`."""
        with self._changed:
            if (session := self._sessions.get(request_id)) is not None:  # another connection to this very worker
                self._free(session, "its client came back")
                self._changed.wait_for(lambda: self._sessions.get(request_id) is not session, self._lease)
        while True:
            since = time.monotonic()
            found = self._client.claim(Key(self._space, request_id), self._owner, self._lease)
            if found.outcome != "held" or since >= deadline:
                return found, since
            time.sleep(min(_LOOK, found.wait))

    # --- what moves requests uses ---------------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """The name under which this worker owns requests."""
        return self._owner

    def find(self, request_id: str) -> Session | None:
        """The hold that a generation belongs to; None where nothing of it is in the store."""
        with self._changed:
            for session in self._sessions.values():
                if not session.unkept and any(request.id == request_id for request in session.requests):
                    return session
        return None

    def freeze(self, session: Session, deadline: float) -> bool:
        """Tells nothing more of it until `thaw` or `handed`; False, and nothing is frozen, where it is over."""
        with self._changed:
            session.frozen = True
            self._changed.wait_for(
                lambda: session.over or session.answered == session.begun, max(0.0, deadline - time.monotonic())
            )
            if session.over or session.complete or session.answered != session.begun:
                session.frozen = False
            self._changed.notify_all()
            return session.frozen

    def thaw(self, session: Session, epoch: int = 0) -> None:
        """It stays here; with `epoch`, under that one, and all of it is told anew."""
        with self._changed:
            session.frozen = False
            if epoch:
                self._anew(session, epoch)
            self._changed.notify_all()

    def transfer(self, session: Session, owner: str, epoch: int, successor: str) -> bool:
        """Makes `successor` its owner under `epoch` + 1, if it is `owner`'s under `epoch`. Raises any `AgentError`."""
        return self._client.transfer(session.key, owner, epoch, successor, self._lease)

    def handed(self, session: Session, successor: str, epoch: int) -> None:
        """`successor` keeps it from here on; what that one makes of it is told through the streams of this hold."""
        with self._changed:
            session.frozen, session.handed, session.epoch = False, successor, epoch
            self._settle(session)
            self._changed.notify_all()

    def retake(self, session: Session, epoch: int, tokens: Sequence[Sequence[int]], ended: Iterable[int]) -> None:
        """One that was handed on is this worker's again, under `epoch`; of each choice `tokens` came, and are told."""
        with self._changed:
            if session.key.id in self._sessions:  # whoever asked for it on another connection has it
                session.over = "its client came back"
                return
            session.handed, session.tokens = "", [list(ids) for ids in tokens]
            session.ended |= set(ended)
            self._anew(session, epoch)
            self._sessions[session.key.id] = session
            self._changed.notify_all()

    def lost(self, session: Session, why: str) -> None:
        """Nothing more of it is told here, and whose it is now is for the store to say."""
        with self._changed:
            session.frozen = False
            session.over = session.over or why
            self._settle(session)
            self._changed.notify_all()

    def inherit(
        self,
        context: AnswerContext,
        requests: Sequence[GenerationRequest],
        tokens: Sequence[Sequence[int]],
        ended: Iterable[int],
        epoch: int,
        since: float,
    ) -> Session:
        """A request that its owner made over to this worker, under a lease that began no sooner than `since`."""
        until = since + self._lease
        session = Session(self, Key(self._space, context.id), epoch, context, requests, tokens, until=until)
        session.ended |= set(ended)
        return self._enter(session)

    def give_up(self, request_id: str, claimed: Claimed) -> None:
        """Lets go of what was claimed and cannot be gone on with here."""
        step = Keep(Key(self._space, request_id), self._owner, claimed.epoch, len(claimed.pieces), (), 0.0)
        try:
            self._client.keep([step])
        except AgentError as error:
            log.warning("%s stays held until its lease is over: %s", request_id, error.text)

    def read(self, claimed: Claimed, request_id: str) -> record.Record:
        """Raises `SnapshotRefused`."""
        pieces = [self._seal.open(_about(request_id, n), piece) for n, piece in enumerate(claimed.pieces)]
        return record.assemble(pieces)

    def tell(self, session: Session, choice: int, event: TokenEvent) -> bool:
        with self._changed:
            if session.over:
                return False
            if session.handed and event.finish not in ("cancelled", "moved", "error"):
                return True
            if event.finish in ("cancelled", "moved", "error"):
                self._free(session, f"it ended: {event.error or event.finish}")
                return True
            tokens = session.tokens[choice]
            if event.token is not None and event.index == len(tokens):
                tokens.append(event.token)
            if event.finish is not None:
                session.ended.add(choice)
            if self._due(session, time.monotonic()):
                self._changed.notify_all()
            return self._permitted(session)

    def let_go(self, session: Session, why: str) -> None:
        with self._changed:
            if not session.complete:
                self._free(session, why)

    def close(self, deadline: float) -> None:
        """Lets go of all requests and ends the thread; `deadline` on time.monotonic."""
        with self._changed:
            for session in list(self._sessions.values()):
                if not session.complete:
                    self._free(session, "the function is shutting down")
                if not self.place().revision:  # nothing of it was kept, and nothing can be
                    self._settle(session)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._sessions, max(0.0, deadline - time.monotonic()))
            self._closing = True
            self._changed.notify_all()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        self._client.close()

    # --- with the lock held ---------------------------------------------------------------------------------------

    def _enter(self, session: Session) -> Session:
        with self._changed:
            self._sessions[session.key.id] = session
            self._changed.notify_all()
        return session

    def _anew(self, session: Session, epoch: int) -> None:
        """All of it is told once more, under this epoch, and nothing to its client before the store has answered."""
        session.epoch, session.at, session.sent, session.until = epoch, 0, [0] * len(session.sent), 0.0

    def _free(self, session: Session, why: str) -> None:
        if not session.over:
            session.over, session.free = why, True
            session.closed_at = time.monotonic()
            self._changed.notify_all()

    def _permitted(self, session: Session) -> bool:
        """Whether something may be told now; waits for an answer of the store where the lease is over."""
        now = time.monotonic()
        if session.until > now or session.unkept or not self.place().revision:
            return True
        mark, session.asked = session.begun, True
        self._changed.notify_all()
        answered = self._changed.wait_for(
            lambda: (
                session.over
                or session.unkept
                or session.handed
                or session.until > time.monotonic()
                or session.answered > mark
            ),
            _STUCK,
        )
        if session.over or not answered:
            return False
        # Nobody can take it over through a store that cannot be asked.
        session.until = max(session.until, time.monotonic() + self._lease)
        return True

    def _due(self, session: Session, now: float) -> bool:
        if not self.place().revision or now < session.retry_at or session.frozen:
            return False
        if session.free or session.complete or session.asked or not session.at:
            return True
        fresh = sum(map(len, session.tokens)) - sum(session.sent)
        return (fresh >= self._every and not session.renew_only) or now >= session.until - 2 * self._lease / 3

    def _step(self, session: Session) -> tuple[Keep, list[int]]:
        """What to tell of it, and how many tokens of each choice the store has then."""
        session.begun += 1
        session.asked = False
        if session.at >= _RETELL:
            session.at = 0
        counts = [len(ids) for ids in session.tokens]
        pieces: list[bytes] = []
        if not session.at:
            place = self.place()
            pieces.append(
                record.opening(session.context, [place.snapshot(place.state(request)) for request in session.requests])
            )
        start = session.sent if session.at else [0] * len(counts)
        if not session.renew_only:
            gains = {n: (at, session.tokens[n][at:]) for n, at in enumerate(start) if counts[n] > at or session.cut}
            if gains:
                pieces.append(record.progress(gains))
        sealed = tuple(
            self._seal.close(_about(session.key.id, session.at + n), piece) for n, piece in enumerate(pieces)
        )
        lease = 0.0 if session.free or session.complete else self._lease
        done = session.complete and not session.renew_only
        return Keep(session.key, self._owner, session.epoch, session.at, sealed, lease, done), counts

    def _heard(self, session: Session, step: Keep, counts: list[int], since: float, kept: KeptStatus) -> None:
        session.answered = session.begun
        match kept.outcome:
            case "kept":
                session.at = step.at + len(step.pieces)
                session.until = since + step.lease
                if step.pieces:
                    session.sent, session.cut = counts, False
                if not step.lease:
                    self._settle(session)
                elif kept.wanted:
                    self._free(session, "another replica was asked for it")
            case "gap":
                session.at, session.sent = 0, [0] * len(session.sent)
            case "too_large":
                log.warning("%s is not kept any further: %s", session.key.id, kept.why)
                session.renew_only, session.unkept = True, not session.at
                if session.unkept:
                    self._settle(session)
            case _:
                log.warning("%s was taken over by another replica; nothing more is told of it here", session.key.id)
                session.over = session.over or "another replica took it over"
                self._settle(session)

    def _settle(self, session: Session) -> None:
        if self._sessions.get(session.key.id) is session:
            del self._sessions[session.key.id]

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                due = self._wait()
                if not due:
                    return
                since = time.monotonic()
                steps = [(session, *self._step(session)) for session in due]
            failed = ""
            try:
                results = self._client.keep([step for _, step, _ in steps])
            except AgentError as error:
                failed = f"{error.text} [{error.code}]"
            except Exception:  # a fault of ours must not leave requests without their keeper
                log.exception("keeping requests failed")
                failed = "a fault, see above"
            with self._changed:
                if failed:
                    self._failed([session for session, _, _ in steps], failed)
                else:
                    for (session, step, counts), kept in zip(steps, results, strict=True):
                        self._heard(session, step, counts, since, kept)
                self._changed.notify_all()

    def _wait(self) -> list[Session]:
        """The requests of which something is to be told; none once all is over."""
        while True:
            now = time.monotonic()
            if due := [session for session in self._sessions.values() if self._due(session, now)]:
                return due
            if self._closing:
                return []
            self._changed.wait(self._lease / 6)

    def _failed(self, sessions: Sequence[Session], why: str) -> None:
        now = time.monotonic()
        log.warning("what runs cannot be kept now (%d requests): %s", len(sessions), why)
        for session in sessions:
            session.answered, session.retry_at = session.begun, now + _RETRY
            if self._closing or (session.closed_at and now > session.closed_at + _LAST_WORD):
                self._settle(session)
            elif session.complete and not session.closed_at:
                session.closed_at = now


def _about(request_id: str, number: int) -> str:
    return f"piece {number} of {request_id}"


def kept_by(
    config: FunctionConfig, client: Callable[[], CacheClient], identity: Callable[[], ReplicaIdentity]
) -> Sessions | None:
    """The sessions of a worker, as its settings have them; None for a function that keeps no requests.

    Raises `BadConfig`.
    """
    if not config.checkpoints:
        return None
    owner = f"worker-{os.getpid()}-{secrets.token_hex(8)}"
    key = seal(config.function_key_file)
    return Sessions(SnapshotClient(client), config.checkpoints, key, identity, owner=owner, every=_EVERY)
