"""The sessions of a worker: which of its requests are kept, and its right to answer them.

    open / claim ──► Session ──record…──► complete                           the store has the whole answer
                       │  └─ let_go ──► free                                 any replica may claim the request at once
                       ├─ fenced, or wanted by another replica ──► over      no more tokens are sent here
                       └─ freeze ──► transfer ──► handed                     another worker owns it; we relay its tokens
                            └─ thaw ──► Session   └─ transfer ──► retake ──► Session     that worker is gone

One thread sends the agent what is new (`keep`). A token goes to the client only while the lease on its request runs.
The lease counts from the moment a `keep` is sent, not from its answer, so it ends here before it ends in the store: a
worker that was stopped and wakes finds its lease over, and asks the store before it sends another token. A store that
does not answer gives the request to no other replica either, and so does not stop a worker. Tokens go to the client
first and to the store a little later: those that a crash loses are generated again.
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
from cache_agent.wire.requests import KeepStatus
from runtime.config import FunctionConfig
from runtime.engine.base import GenerationRequest, TokenEvent
from runtime.resume import record
from runtime.resume.record import AnswerContext
from runtime.resume.seal import Seal, seal
from runtime.resume.session import Session
from runtime.resume.snapshot import ReplicaIdentity

log = logging.getLogger("glowplug.checkpoint")

LEASE = 3.0  # seconds that a `keep` leases a request, and that a client may wait after a crash
_REWRITE = 256  # pieces after which a record is written anew, as two pieces
_RETRY = 0.5  # seconds between attempts while the store does not answer
_LAST_ATTEMPTS = 30.0  # seconds in which recording the end of a request is tried again
_EVERY = 16  # new tokens of a request after which they are recorded
_STUCK = 15.0  # seconds; upper bound of a wait that the agent's deadlines end sooner
_LOOK = 0.1  # seconds between two attempts to claim a request that another replica owns


class Sessions:
    """The kept requests of one worker; all methods may be called from any thread. `close` records what is left."""

    def __init__(
        self,
        client: SnapshotClient,
        space: str,
        seal: Seal,
        identity: Callable[[], ReplicaIdentity],
        *,
        owner: str,
        every: int,
        lease: float = LEASE,
    ) -> None:
        """`identity` returns this replica's identity (nothing is kept while its revision is unknown).

        `owner` names this worker in the store; a request is recorded after `every` new tokens; `lease` in seconds.
        """
        self.identity = identity
        self._client, self._space, self._seal = client, space, seal
        self.owner, self._every, self._lease = owner, every, lease
        self._changed = threading.Condition()
        self._sessions: dict[str, Session] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    # --- for answers ----------------------------------------------------------------------------------------------

    def open(self, context: AnswerContext, requests: Sequence[GenerationRequest]) -> Session:
        """Keep a request that begins here."""
        return self._enter(Session(self, Key(self._space, context.id), 1, context, requests))

    def resume(self, claimed: Claimed, found: record.Record, tokens: Sequence[Sequence[int]], since: float) -> Session:
        """Keep a request that was claimed at `since`, with these tokens of each choice; the store's further ones go."""
        requests = [choice.state.request for choice in found.choices]
        key, until = Key(self._space, found.context.id), since + self._lease
        at = len(claimed.pieces)
        return self._enter(Session(self, key, claimed.epoch, found.context, requests, tokens, at, until))

    def claim(self, request_id: str, deadline: float) -> tuple[Claimed, float]:
        """Ask the store for a request until its present owner lets go, at the latest at `deadline`.

        Returns the outcome and the time (of time.monotonic) of that attempt. Raises any `AgentError`.
        """
        with self._changed:
            if (session := self._sessions.get(request_id)) is not None:  # on another connection to this worker
                self._release(session, "its client came back")
                self._changed.wait_for(lambda: self._sessions.get(request_id) is not session, self._lease)
        while True:
            since = time.monotonic()
            found = self._client.claim(Key(self._space, request_id), self.owner, self._lease)
            if found.outcome != "held" or since >= deadline:
                return found, since
            time.sleep(min(_LOOK, found.wait))

    # --- for hand-offs --------------------------------------------------------------------------------------------

    def find(self, request_id: str) -> Session | None:
        """Return the session of a generation; None where the store has nothing of its request."""
        with self._changed:
            for session in self._sessions.values():
                if not session.unkept and any(request.id == request_id for request in session.requests):
                    return session
        return None

    def freeze(self, session: Session, deadline: float) -> bool:
        """Send the store nothing of the session until `thaw` or `handed`; False, without effect, if it is over."""
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
        """End a freeze: the request stays here; with `epoch`, under that epoch and recorded anew."""
        with self._changed:
            session.frozen = False
            if epoch:
                self._restart(session, epoch)
            self._changed.notify_all()

    def transfer(self, session: Session, owner: str, epoch: int, successor: str) -> bool:
        """Make `successor` the owner under `epoch` + 1; False unless `owner` owns the request under `epoch`.

        Raises any `AgentError`.
        """
        return self._client.transfer(session.key, owner, epoch, successor, self._lease)

    def handed(self, session: Session, successor: str, epoch: int) -> None:
        """Note that `successor` owns the request from now on; its tokens come through this session's answers."""
        with self._changed:
            session.frozen, session.handed, session.epoch = False, successor, epoch
            self._settle(session)
            self._changed.notify_all()

    def retake(self, session: Session, epoch: int, tokens: Sequence[Sequence[int]], ended: Iterable[int]) -> None:
        """Keep a handed session here again, under `epoch`, with the tokens of each choice that came meanwhile."""
        with self._changed:
            if session.key.id in self._sessions:  # the client resumed it on another connection
                session.over = "its client came back"
                return
            session.handed, session.tokens = "", [list(ids) for ids in tokens]
            session.ended |= set(ended)
            self._restart(session, epoch)
            self._sessions[session.key.id] = session
            self._changed.notify_all()

    def lost(self, session: Session, why: str) -> None:
        """End a session whose owner only the store knows."""
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
        """Keep a request that its owner transferred to this worker, under a lease that began at `since` or later."""
        until = since + self._lease
        session = Session(self, Key(self._space, context.id), epoch, context, requests, tokens, until=until)
        session.ended |= set(ended)
        return self._enter(session)

    def give_up(self, request_id: str, claimed: Claimed) -> None:
        """Give up the lease on a claimed request that cannot be continued here."""
        step = Keep(Key(self._space, request_id), self.owner, claimed.epoch, len(claimed.pieces), (), 0.0)
        try:
            self._client.keep([step])
        except AgentError as error:
            log.warning("%s stays held until its lease is over: %s", request_id, error.text)

    def read(self, claimed: Claimed, request_id: str) -> record.Record:
        """Decrypt and assemble the record of a claimed request. Raises `SnapshotRefused`."""
        pieces = [self._seal.open(_piece_name(request_id, n), piece) for n, piece in enumerate(claimed.pieces)]
        return record.assemble(pieces)

    def record(self, session: Session, choice: int, event: TokenEvent) -> bool:
        with self._changed:
            if session.over:
                return False
            if session.handed and event.finish not in ("cancelled", "moved", "error"):
                return True
            if event.finish in ("cancelled", "moved", "error"):
                self._release(session, f"it ended: {event.error or event.finish}")
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
                self._release(session, why)

    def close(self, deadline: float) -> None:
        """Let go of all requests and end the thread, at the latest at `deadline` (of time.monotonic)."""
        with self._changed:
            for session in list(self._sessions.values()):
                if not session.complete:
                    self._release(session, "the function is shutting down")
                if not self.identity().revision:  # nothing was recorded, and nothing can be
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

    def _restart(self, session: Session, epoch: int) -> None:
        """Record the whole session anew under this epoch; its client gets nothing before the store has answered."""
        session.epoch, session.at, session.stored, session.until = epoch, 0, [0] * len(session.stored), 0.0

    def _release(self, session: Session, why: str) -> None:
        if not session.over:
            session.over, session.free = why, True
            session.closed_at = time.monotonic()
            self._changed.notify_all()

    def _permitted(self, session: Session) -> bool:
        """Return whether tokens may be sent now; where the lease is over, wait for the store's answer."""
        now = time.monotonic()
        if session.until > now or session.unkept or not self.identity().revision:
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
        # No other replica can claim the request from a store that does not answer.
        session.until = max(session.until, time.monotonic() + self._lease)
        return True

    def _due(self, session: Session, now: float) -> bool:
        if not self.identity().revision or now < session.retry_at or session.frozen:
            return False
        if session.free or session.complete or session.asked or not session.at:
            return True
        fresh = sum(map(len, session.tokens)) - sum(session.stored)
        return (fresh >= self._every and not session.renew_only) or now >= session.until - 2 * self._lease / 3

    def _step(self, session: Session) -> tuple[Keep, list[int]]:
        """Return the next step for the store, and how many tokens of each choice the store has after that."""
        session.begun += 1
        session.asked = False
        if session.at >= _REWRITE:
            session.at = 0
        counts = [len(ids) for ids in session.tokens]
        pieces: list[bytes] = []
        if not session.at:
            identity = self.identity()
            snapshots = [identity.snapshot(identity.state(request)) for request in session.requests]
            pieces.append(record.opening(session.context, snapshots))
        start = session.stored if session.at else [0] * len(counts)
        if not session.renew_only:
            gains = {n: (at, session.tokens[n][at:]) for n, at in enumerate(start) if counts[n] > at or session.cut}
            if gains:
                pieces.append(record.progress(gains))
        sealed = tuple(
            self._seal.close(_piece_name(session.key.id, session.at + n), piece) for n, piece in enumerate(pieces)
        )
        lease = 0.0 if session.free or session.complete else self._lease
        done = session.complete and not session.renew_only
        return Keep(session.key, self.owner, session.epoch, session.at, sealed, lease, done), counts

    def _apply(self, session: Session, step: Keep, counts: list[int], since: float, kept: KeepStatus) -> None:
        session.answered = session.begun
        match kept.outcome:
            case "kept":
                session.at = step.at + len(step.pieces)
                session.until = since + step.lease
                if step.pieces:
                    session.stored, session.cut = counts, False
                if not step.lease:
                    self._settle(session)
                elif kept.wanted:
                    self._release(session, "another replica was asked for it")
            case "gap":
                session.at, session.stored = 0, [0] * len(session.stored)
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
            except Exception:  # a defect must not end the thread, and with it the recording of all requests
                log.exception("keeping requests failed")
                failed = "a fault, see above"
            with self._changed:
                if failed:
                    self._failed([session for session, _, _ in steps], failed)
                else:
                    for (session, step, counts), kept in zip(steps, results, strict=True):
                        self._apply(session, step, counts, since, kept)
                self._changed.notify_all()

    def _wait(self) -> list[Session]:
        """Wait for sessions that have something to record; return none once `close` has ended everything."""
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
            if self._closing or (session.closed_at and now > session.closed_at + _LAST_ATTEMPTS):
                self._settle(session)
            elif session.complete and not session.closed_at:
                session.closed_at = now


def _piece_name(request_id: str, number: int) -> str:
    return f"piece {number} of {request_id}"


def make_sessions(
    config: FunctionConfig, client: Callable[[], CacheClient], identity: Callable[[], ReplicaIdentity]
) -> Sessions | None:
    """Return the sessions that a worker's settings ask for; None for a function that keeps no requests.

    Raises `BadConfig`.
    """
    if not config.checkpoints:
        return None
    owner = f"worker-{os.getpid()}-{secrets.token_hex(8)}"
    key = seal(config.function_key_file)
    return Sessions(SnapshotClient(client), config.checkpoints, key, identity, owner=owner, every=_EVERY)
