"""The store of running requests' records and of their owners: the interface, and the implementation in memory.

    absent ──keep(at 0)──► held by an owner, epoch 1 ──keep…──► done            any state ──expiry──► absent
                             │  ▲
               released, or its lease over ──claim by another──► held by that one, epoch + 1

A record belongs to one owner under one epoch, and only that pair may add to it: a former owner's `keep` is answered
`fenced`. An owner holds a lease, which each `keep` renews. While the lease runs no other claim succeeds, so the owner
may answer its client without asking the store. A claim in the meantime leaves a note, which the next `keep` returns as
`wanted`: the owner may let go at once. Pieces are opaque, numbered, and only added at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal, NamedTuple, Protocol

from cache_agent.errors import SnapshotTooLarge

MOST_CHANGES = 64  # changes of owner that a record remembers


class Key(NamedTuple):
    """The name of a record: `space` is the function's, `id` the request's."""

    space: str
    id: str


class Keep(NamedTuple):
    """A step that adds pieces from number `at` on; `lease` in seconds, 0 lets go; `done`: the record is complete."""

    key: Key
    owner: str
    epoch: int
    at: int
    pieces: tuple[bytes, ...]
    lease: float
    done: bool = False


Outcome = Literal["kept", "fenced", "gap"]


class KeepResult(NamedTuple):
    """The answer to a `Keep`.

    `fenced`: another owner has the record by now. `gap`: pieces before `at` are missing, send all again from 0.
    `wanted`: another owner claims the record and waits.
    """

    outcome: Outcome
    wanted: bool = False


Claim = Literal["taken", "done", "held", "absent"]


class Claimed(NamedTuple):
    """The answer to a claim.

    `taken`: the caller owns the record under `epoch`. `held`: claim again after `wait` seconds. `done`: complete.
    """

    outcome: Claim
    epoch: int = 0
    pieces: tuple[bytes, ...] = ()
    wait: float = 0.0


class Change(NamedTuple):
    """A change of a record's owner."""

    epoch: int
    owner: str


class Snapshots(Protocol):
    """A store of records; each call is one atomic step. Raises `StoreUnavailable`, `keep` also `SnapshotTooLarge`."""

    def keep(self, keep: Keep) -> KeepResult: ...

    def claim(self, key: Key, owner: str, lease: float) -> Claimed: ...

    def transfer(self, key: Key, owner: str, epoch: int, successor: str, lease: float) -> bool:
        """Make `successor` the owner under `epoch` + 1; False unless the record was `owner`'s under `epoch`.

        The second of two equal calls changes nothing and returns True. A missing record is made, without a piece; a
        complete one is open again.
        """
        ...

    def drop(self, key: Key, owner: str, epoch: int) -> None:
        """Forget a record that is still this owner's."""
        ...

    def history(self, key: Key) -> list[Change]:
        """Return the owners of a record, the first one first."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Record:
    owner: str
    epoch: int
    until: float
    expires: float
    pieces: list[bytes] = field(default_factory=list)
    wanted: str = ""
    done: bool = False
    changes: list[Change] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(map(len, self.pieces))


class InProcessSnapshots:
    """The store of one node, in the agent's memory: its records survive a worker, not the agent."""

    def __init__(
        self, ttl: float, most_bytes: int, space_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """A record expires `ttl` seconds after its last change. `most_bytes` bounds one, `space_bytes` a function's."""
        self._ttl, self._most, self._space = ttl, most_bytes, space_bytes
        self._clock = clock
        self._lock = Lock()
        self._records: dict[Key, _Record] = {}
        self._sizes: dict[str, int] = {}

    def keep(self, keep: Keep) -> KeepResult:
        now = self._clock()
        with self._lock:
            self._expire(now)
            record = self._records.get(keep.key)
            if record is None:
                if keep.at:
                    return KeepResult("gap")
                record = _Record(keep.owner, keep.epoch, 0.0, 0.0, changes=[Change(keep.epoch, keep.owner)])
            if keep.epoch > record.epoch:  # the store lost the last change of owner, which the new owner makes known
                if keep.at:
                    return KeepResult("gap")
                record.owner, record.epoch = keep.owner, keep.epoch
                record.changes = [*record.changes, Change(keep.epoch, keep.owner)][-MOST_CHANGES:]
            if (record.owner, record.epoch) != (keep.owner, keep.epoch):
                return KeepResult("fenced")
            if keep.at > len(record.pieces):
                return KeepResult("gap")
            fresh = [*record.pieces[: keep.at], *keep.pieces]
            size = sum(map(len, fresh))
            in_space = self._sizes.get(keep.key.space, 0) + size - record.size
            too_large(keep.key, size, self._most, in_space, self._space)
            self._sizes[keep.key.space] = in_space
            record.pieces, record.until = fresh, now + keep.lease
            record.done = record.done or keep.done
            self._touch(keep.key, record, now)
            wanted = bool(record.wanted) and not keep.done
            if not keep.lease:
                record.wanted = ""
            return KeepResult("kept", wanted)

    def claim(self, key: Key, owner: str, lease: float) -> Claimed:
        now = self._clock()
        with self._lock:
            self._expire(now)
            record = self._records.get(key)
            if record is None:
                return Claimed("absent")
            if record.done:
                return Claimed("done", record.epoch, tuple(record.pieces))
            if record.until > now and record.owner != owner:
                record.wanted = owner
                return Claimed("held", record.epoch, (), record.until - now)
            self._change(record, owner, now + lease)
            self._touch(key, record, now)
            return Claimed("taken", record.epoch, tuple(record.pieces))

    def transfer(self, key: Key, owner: str, epoch: int, successor: str, lease: float) -> bool:
        now = self._clock()
        with self._lock:
            self._expire(now)
            record = self._records.get(key)
            if record is None:
                record = _Record(owner, epoch, 0.0, 0.0, changes=[Change(epoch, owner)])
            if (record.owner, record.epoch) == (successor, epoch + 1):
                return True
            if (record.owner, record.epoch) != (owner, epoch):
                return False
            self._change(record, successor, now + lease)
            record.done = False  # its last tokens reached no client: the successor makes them again
            self._touch(key, record, now)
            return True

    def drop(self, key: Key, owner: str, epoch: int) -> None:
        with self._lock:
            record = self._records.get(key)
            if record is not None and (record.owner, record.epoch) == (owner, epoch):
                self._forget(key)

    def history(self, key: Key) -> list[Change]:
        with self._lock:
            record = self._records.get(key)
            return list(record.changes) if record else []

    def close(self) -> None:
        with self._lock:
            self._records.clear()
            self._sizes.clear()

    def _change(self, record: _Record, owner: str, until: float) -> None:
        record.owner, record.epoch, record.until, record.wanted = owner, record.epoch + 1, until, ""
        record.changes = [*record.changes, Change(record.epoch, owner)][-MOST_CHANGES:]

    def _touch(self, key: Key, record: _Record, now: float) -> None:
        record.expires = now + self._ttl
        self._records.pop(key, None)  # to the end: records stay in the order of expiry
        self._records[key] = record

    def _expire(self, now: float) -> None:
        while self._records and next(iter(self._records.values())).expires <= now:
            self._forget(next(iter(self._records)))

    def _forget(self, key: Key) -> None:
        left = self._sizes.get(key.space, 0) - self._records.pop(key).size
        self._sizes[key.space] = left
        if not left:
            del self._sizes[key.space]


def too_large(key: Key, size: int, most: int, in_space: int, space: int) -> None:
    """Raise `SnapshotTooLarge` where one of the limits is passed; all sizes in bytes."""
    if size > most:
        raise SnapshotTooLarge(f"{key.id} of {key.space} takes {size} bytes, and {most} may be kept of one request")
    if in_space > space:
        raise SnapshotTooLarge(
            f"{key.space} keeps {in_space} bytes with this, and may keep {space}; raise GLOWPLUG_SNAPSHOT_SPACE, or "
            "let it expire sooner"
        )
