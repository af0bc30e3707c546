"""A function's side of its agent's snapshots of requests: one connection, made again when it breaks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.lease import expect
from cache_agent.errors import AgentError, AgentUnreachable
from cache_agent.snapshots.store import Claimed, Keep, Key
from cache_agent.wire import blobs
from cache_agent.wire.channel import Channel, Disconnected
from cache_agent.wire.requests import (
    Checkpoint,
    Checkpointed,
    ClaimReply,
    ClaimRequest,
    KeepItem,
    KeepStatus,
    TransferReply,
    TransferRequest,
)

R = TypeVar("R")

_MOST_ITEMS = 64  # in one message


class SnapshotClient:
    """The snapshots of running requests, by name. One exchange at a time, from any thread.

    Every method raises any `AgentError`.
    """

    def __init__(self, client: Callable[[], CacheClient], timeout: float = 3.0) -> None:
        """`client` makes the client that connects; `timeout` bounds every exchange, in seconds."""
        self._make = client
        self._timeout = timeout
        self._lock = threading.Lock()
        self._channel: Channel | None = None

    def keep(self, steps: Sequence[Keep]) -> list[KeepStatus]:
        """Store steps of requests, as many per message as fit, and return their outcomes in the same order."""
        results: list[KeepStatus] = []
        small: list[Keep] = []
        size = 0
        for step in steps:
            more = sum(map(len, step.pieces))
            if small and (size + more > blobs.INLINE or len(small) == _MOST_ITEMS):
                results += self._keep(small)
                small, size = [], 0
            small, size = [*small, step], size + more
        return results + (self._keep(small) if small else [])

    def _keep(self, steps: Sequence[Keep]) -> list[KeepStatus]:
        items = [
            KeepItem(*step.key, step.owner, step.epoch, step.at, list(map(len, step.pieces)), step.lease, step.done)
            for step in steps
        ]
        _, data, fds = blobs.pack([piece for step in steps for piece in step.pieces])

        def exchange(channel: Channel) -> list[KeepStatus]:
            channel.send(Checkpoint(items, data, len(fds)), fds)
            return expect(channel, Checkpointed, time.monotonic() + self._timeout)[0].results

        try:
            return self._exchange(exchange)
        finally:
            for fd in fds:
                os.close(fd)

    def claim(self, key: Key, owner: str, lease: float) -> Claimed:
        """Take a request over; see `Snapshots.claim`."""

        def exchange(channel: Channel) -> Claimed:
            channel.send(ClaimRequest(*key, owner, lease))
            reply, fds = expect(channel, ClaimReply, time.monotonic() + self._timeout)
            try:
                pieces = blobs.unpack(reply.lengths, reply.data, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            return Claimed(reply.outcome, reply.epoch, tuple(pieces), reply.wait)  # type: ignore[arg-type]

        return self._exchange(exchange)

    def transfer(self, key: Key, owner: str, epoch: int, successor: str, lease: float) -> bool:
        """Make `successor` the request's owner; see `Snapshots.transfer`."""

        def exchange(channel: Channel) -> bool:
            channel.send(TransferRequest(*key, owner, epoch, successor, lease))
            return expect(channel, TransferReply, time.monotonic() + self._timeout)[0].done

        return self._exchange(exchange)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _exchange(self, exchange: Callable[[Channel], R]) -> R:
        """Run an exchange, and once more where a connection that was open before has broken: steps are idempotent."""
        with self._lock:
            fresh = self._channel is None
            try:
                return self._on_channel(exchange)
            except AgentUnreachable:
                if fresh:
                    raise
            return self._on_channel(exchange)

    def _on_channel(self, exchange: Callable[[Channel], R]) -> R:
        if self._channel is None:
            self._channel = self._make().connect()
        try:
            return exchange(self._channel)
        except Disconnected as error:
            self._drop()
            raise AgentUnreachable(f"the cache agent broke off: {error}") from error
        except AgentError:
            if self._channel.state != "open":  # a late answer would be taken for that of the next exchange
                self._drop()
            raise
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
