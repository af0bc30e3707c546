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
        self._holds: dict[str, Session] = {}
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
            if (hold := self._holds.get(request_id)) is not None:  # another connection to this very worker
                self._free(hold, "its client came back")
                self._changed.wait_for(lambda: self._holds.get(request_id) is not hold, self._lease)
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
            for hold in self._holds.values():
                if not hold.unkept and any(request.id == request_id for request in hold.requests):
                    return hold
        return None

    def freeze(self, hold: Session, deadline: float) -> bool:
        """Tells nothing more of it until `thaw` or `handed`; False, and nothing is frozen, where it is over."""
        with self._changed:
            hold.frozen = True
            self._changed.wait_for(
                lambda: hold.over or hold.answered == hold.begun, max(0.0, deadline - time.monotonic())
            )
            if hold.over or hold.complete or hold.answered != hold.begun:
                hold.frozen = False
            self._changed.notify_all()
            return hold.frozen

    def thaw(self, hold: Session, epoch: int = 0) -> None:
        """It stays here; with `epoch`, under that one, and all of it is told anew."""
        with self._changed:
            hold.frozen = False
            if epoch:
                self._anew(hold, epoch)
            self._changed.notify_all()

    def transfer(self, hold: Session, owner: str, epoch: int, successor: str) -> bool:
        """Makes `successor` its owner under `epoch` + 1, if it is `owner`'s under `epoch`. Raises any `AgentError`."""
        return self._client.transfer(hold.key, owner, epoch, successor, self._lease)

    def handed(self, hold: Session, successor: str, epoch: int) -> None:
        """`successor` keeps it from here on; what that one makes of it is told through the streams of this hold."""
        with self._changed:
            hold.frozen, hold.handed, hold.epoch = False, successor, epoch
            self._settle(hold)
            self._changed.notify_all()

    def retake(self, hold: Session, epoch: int, tokens: Sequence[Sequence[int]], ended: Iterable[int]) -> None:
        """One that was handed on is this worker's again, under `epoch`; of each choice `tokens` came, and are told."""
        with self._changed:
            if hold.key.id in self._holds:  # whoever asked for it on another connection has it
                hold.over = "its client came back"
                return
            hold.handed, hold.tokens = "", [list(ids) for ids in tokens]
            hold.ended |= set(ended)
            self._anew(hold, epoch)
            self._holds[hold.key.id] = hold
            self._changed.notify_all()

    def lost(self, hold: Session, why: str) -> None:
        """Nothing more of it is told here, and whose it is now is for the store to say."""
        with self._changed:
            hold.frozen = False
            hold.over = hold.over or why
            self._settle(hold)
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
        hold = Session(self, Key(self._space, context.id), epoch, context, requests, tokens, until=until)
        hold.ended |= set(ended)
        return self._enter(hold)

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

    def tell(self, hold: Session, choice: int, event: TokenEvent) -> bool:
        with self._changed:
            if hold.over:
                return False
            if hold.handed and event.finish not in ("cancelled", "moved", "error"):
                return True
            if event.finish in ("cancelled", "moved", "error"):
                self._free(hold, f"it ended: {event.error or event.finish}")
                return True
            tokens = hold.tokens[choice]
            if event.token is not None and event.index == len(tokens):
                tokens.append(event.token)
            if event.finish is not None:
                hold.ended.add(choice)
            if self._due(hold, time.monotonic()):
                self._changed.notify_all()
            return self._permitted(hold)

    def let_go(self, hold: Session, why: str) -> None:
        with self._changed:
            if not hold.complete:
                self._free(hold, why)

    def close(self, deadline: float) -> None:
        """Lets go of all requests and ends the thread; `deadline` on time.monotonic."""
        with self._changed:
            for hold in list(self._holds.values()):
                if not hold.complete:
                    self._free(hold, "the function is shutting down")
                if not self.place().revision:  # nothing of it was kept, and nothing can be
                    self._settle(hold)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._holds, max(0.0, deadline - time.monotonic()))
            self._closing = True
            self._changed.notify_all()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        self._client.close()

    # --- with the lock held ---------------------------------------------------------------------------------------

    def _enter(self, hold: Session) -> Session:
        with self._changed:
            self._holds[hold.key.id] = hold
            self._changed.notify_all()
        return hold

    def _anew(self, hold: Session, epoch: int) -> None:
        """All of it is told once more, under this epoch, and nothing to its client before the store has answered."""
        hold.epoch, hold.at, hold.sent, hold.until = epoch, 0, [0] * len(hold.sent), 0.0

    def _free(self, hold: Session, why: str) -> None:
        if not hold.over:
            hold.over, hold.free = why, True
            hold.closed_at = time.monotonic()
            self._changed.notify_all()

    def _permitted(self, hold: Session) -> bool:
        """Whether something may be told now; waits for an answer of the store where the lease is over."""
        now = time.monotonic()
        if hold.until > now or hold.unkept or not self.place().revision:
            return True
        mark, hold.asked = hold.begun, True
        self._changed.notify_all()
        answered = self._changed.wait_for(
            lambda: hold.over or hold.unkept or hold.handed or hold.until > time.monotonic() or hold.answered > mark,
            _STUCK,
        )
        if hold.over or not answered:
            return False
        # Nobody can take it over through a store that cannot be asked.
        hold.until = max(hold.until, time.monotonic() + self._lease)
        return True

    def _due(self, hold: Session, now: float) -> bool:
        if not self.place().revision or now < hold.retry_at or hold.frozen:
            return False
        if hold.free or hold.complete or hold.asked or not hold.at:
            return True
        fresh = sum(map(len, hold.tokens)) - sum(hold.sent)
        return (fresh >= self._every and not hold.renew_only) or now >= hold.until - 2 * self._lease / 3

    def _step(self, hold: Session) -> tuple[Keep, list[int]]:
        """What to tell of it, and how many tokens of each choice the store has then."""
        hold.begun += 1
        hold.asked = False
        if hold.at >= _RETELL:
            hold.at = 0
        counts = [len(ids) for ids in hold.tokens]
        pieces: list[bytes] = []
        if not hold.at:
            place = self.place()
            pieces.append(
                record.opening(hold.context, [place.snapshot(place.state(request)) for request in hold.requests])
            )
        start = hold.sent if hold.at else [0] * len(counts)
        if not hold.renew_only:
            gains = {n: (at, hold.tokens[n][at:]) for n, at in enumerate(start) if counts[n] > at or hold.cut}
            if gains:
                pieces.append(record.progress(gains))
        sealed = tuple(self._seal.close(_about(hold.key.id, hold.at + n), piece) for n, piece in enumerate(pieces))
        lease = 0.0 if hold.free or hold.complete else self._lease
        done = hold.complete and not hold.renew_only
        return Keep(hold.key, self._owner, hold.epoch, hold.at, sealed, lease, done), counts

    def _heard(self, hold: Session, step: Keep, counts: list[int], since: float, kept: KeptStatus) -> None:
        hold.answered = hold.begun
        match kept.outcome:
            case "kept":
                hold.at = step.at + len(step.pieces)
                hold.until = since + step.lease
                if step.pieces:
                    hold.sent, hold.cut = counts, False
                if not step.lease:
                    self._settle(hold)
                elif kept.wanted:
                    self._free(hold, "another replica was asked for it")
            case "gap":
                hold.at, hold.sent = 0, [0] * len(hold.sent)
            case "too_large":
                log.warning("%s is not kept any further: %s", hold.key.id, kept.why)
                hold.renew_only, hold.unkept = True, not hold.at
                if hold.unkept:
                    self._settle(hold)
            case _:
                log.warning("%s was taken over by another replica; nothing more is told of it here", hold.key.id)
                hold.over = hold.over or "another replica took it over"
                self._settle(hold)

    def _settle(self, hold: Session) -> None:
        if self._holds.get(hold.key.id) is hold:
            del self._holds[hold.key.id]

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                due = self._wait()
                if not due:
                    return
                since = time.monotonic()
                steps = [(hold, *self._step(hold)) for hold in due]
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
                    self._failed([hold for hold, _, _ in steps], failed)
                else:
                    for (hold, step, counts), kept in zip(steps, results, strict=True):
                        self._heard(hold, step, counts, since, kept)
                self._changed.notify_all()

    def _wait(self) -> list[Session]:
        """The requests of which something is to be told; none once all is over."""
        while True:
            now = time.monotonic()
            if due := [hold for hold in self._holds.values() if self._due(hold, now)]:
                return due
            if self._closing:
                return []
            self._changed.wait(self._lease / 6)

    def _failed(self, holds: Sequence[Session], why: str) -> None:
        now = time.monotonic()
        log.warning("what runs cannot be kept now (%d requests): %s", len(holds), why)
        for hold in holds:
            hold.answered, hold.retry_at = hold.begun, now + _RETRY
            if self._closing or (hold.closed_at and now > hold.closed_at + _LAST_WORD):
                self._settle(hold)
            elif hold.complete and not hold.closed_at:
                hold.closed_at = now


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
