"""The store of snapshots that nodes share through Redis.

    glowplug:snapshot:<space>:<id>           hash    owner, epoch, until (ms of Redis' clock), wanted, done
    glowplug:snapshot:<space>:<id>:pieces    list    the pieces, in order
    glowplug:snapshot:<space>:<id>:changes   list    "<epoch> <owner>", the fencing log of this request
    glowplug:snapshot:<space>:               zset    id -> when it expires (ms)
    glowplug:snapshot:<space>:sizes          hash    id -> bytes, and their sum as " total"

All keys expire. Every step is one script (snapshots.lua), so atomic, and timed by Redis' clock alone. A request's id
has at least 16 characters, so none is called `sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_agent.cluster.redis_connection import connect
from cache_agent.errors import SnapshotTooLarge, StoreUnavailable
from cache_agent.snapshots.store import Change, Claimed, Keep, KeepResult, Key, too_large


class RedisSnapshots:
    """The store of a cluster; see `Snapshots`."""

    def __init__(
        self,
        url: str,
        ttl: float,
        most_bytes: int,
        space_bytes: int,
        *,
        password_file: Path | None = None,
        timeout: float = 2.0,
    ) -> None:
        """Limits as in `InProcessSnapshots`; `timeout` bounds every exchange. Raises `BadSetting`; connects later."""
        self._ttl, self._most, self._space = ttl, most_bytes, space_bytes
        self._client = connect(url, password_file, timeout)
        self._step = self._client.register_script(Path(__file__).with_name("snapshots.lua").read_text())

    def keep(self, keep: Keep) -> KeepResult:
        arguments = (keep.owner, keep.epoch, keep.at, _ms(keep.lease), int(keep.done), self._most, self._space)
        outcome, wanted, size, total = self._ask("keep", keep.key, *arguments, *keep.pieces)
        if outcome == b"large":
            too_large(keep.key, size, self._most, total, self._space)
            raise SnapshotTooLarge(f"{keep.key.id} of {keep.key.space} does not fit")
        return KeepResult(outcome.decode(), bool(wanted))

    def claim(self, key: Key, owner: str, lease: float) -> Claimed:
        outcome, epoch, wait, *pieces = self._ask("claim", key, owner, _ms(lease))
        return Claimed(outcome.decode(), epoch, tuple(pieces), wait / 1000)

    def transfer(self, key: Key, owner: str, epoch: int, successor: str, lease: float) -> bool:
        return bool(self._ask("transfer", key, owner, epoch, successor, _ms(lease)))

    def drop(self, key: Key, owner: str, epoch: int) -> None:
        self._ask("drop", key, owner, epoch)

    def history(self, key: Key) -> list[Change]:
        lines = self._translated(lambda: self._client.lrange(_keys(key)[2], 0, -1))
        pairs = [line.decode().partition(" ") for line in lines]
        return [Change(int(epoch), owner) for epoch, _, owner in pairs]

    def close(self) -> None:
        self._client.close()

    def _ask(self, step: str, key: Key, *arguments: object) -> Any:
        ttl = round(self._ttl * 1000)
        return self._translated(lambda: self._step(keys=_keys(key), args=[step, key.id, ttl, *arguments]))

    def _translated(self, exchange: Callable[[], Any]) -> Any:
        """Return the reply. Raises `StoreUnavailable`: the only place where Redis' errors are known."""
        import redis

        try:
            return exchange()
        except (redis.RedisError, OSError, ValueError) as error:
            raise StoreUnavailable(
                f"what is kept of running requests cannot be reached: {type(error).__name__}: {error}"
            ) from error


def _keys(key: Key) -> list[str]:
    space = f"glowplug:snapshot:{key.space}:"
    record = space + key.id
    return [record, f"{record}:pieces", f"{record}:changes", space, f"{space}sizes"]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
