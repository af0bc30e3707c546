"""A worker's part in hand-offs: it adopts other workers' requests, and gives its own away once it drains."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.handoff import find_destination, report
from cache_agent.errors import NoDestination
from cache_agent.wire.requests import HandoffOutcome
from runtime.config import FunctionConfig
from runtime.engine.base import STATE_VERSION
from runtime.function.model import Model
from runtime.handoff.adopted import WorkCounter
from runtime.handoff.departure import Departure
from runtime.handoff.destination import Destination
from runtime.handoff.live import LiveEngine
from runtime.handoff.migration import MigrationReport
from runtime.handoff.pipe import Pipe
from runtime.handoff.relay import Relay
from runtime.handoff.reporter import Reporter
from runtime.resume.seal import Seal, seal
from runtime.resume.snapshot import VERSION, ReplicaIdentity


class Handoffs:
    """The hand-offs of one worker. It replaces `model.engine` by a `LiveEngine`."""

    def __init__(
        self,
        function: str,
        client: Callable[[], CacheClient],
        model: Model,
        identity: Callable[[], ReplicaIdentity],
        sealing: Seal,
        work: WorkCounter,
        released: Callable[[], None],
    ) -> None:
        """`function` is the name that its replicas have in common; `work` counts adopted requests; `released` is called
        when the engine is gone."""
        self._function, self._client, self._model, self._identity, self._seal = (
            function,
            client,
            model,
            identity,
            sealing,
        )
        model.engine = live = LiveEngine(model.engine)
        self._owner = model.sessions.owner if model.sessions else f"worker-{os.getpid()}-{secrets.token_hex(8)}"
        self._reporter = Reporter(lambda items: report(client(), items))
        self._destination = Destination(client, model, identity, self._siblings, self._owner, sealing, work)
        self._departure = Departure(
            live, model.sessions, identity, self._seek, lambda: not model.raw_read, released, self._report
        )
        self._destination.begin()

    def depart(self) -> None:
        """Begin to drain, and return at once; further calls do nothing."""
        self._destination.leave()
        self._departure.begin()

    def close(self, why: str, deadline: float) -> None:
        """End relayed streams with an error after which clients can resume, and report all migrations.

        Returns at `deadline`, on time.monotonic, at the latest; may be called again.
        """
        self._destination.leave()
        self._departure.close(why, deadline)
        self._reporter.close(deadline)

    def _siblings(self) -> str:
        """Return the name that workers have in common which can continue each other's requests; "" while not known."""
        identity = self._identity()
        if not identity.revision:
            return ""
        parts = (VERSION, STATE_VERSION, identity.engine, identity.revision, identity.tokenizer, identity.adapter)
        digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()
        return f"{self._function}:{digest}:{self._seal.name}"

    def _seek(self) -> Relay | None:
        siblings = self._siblings()
        if not siblings:
            return None
        try:
            sock = find_destination(self._client(), siblings, self._owner)
        except NoDestination:
            return None
        pipe = Pipe(sock, self._seal, source=True)
        try:
            return Relay(pipe, pipe.greet(siblings, self._owner), self._identity())
        except BaseException:
            with pipe:
                raise

    def _report(self, migration: MigrationReport) -> None:
        self._reporter.report(
            HandoffOutcome(
                self._function,
                migration.id,
                self._owner,
                migration.to,
                migration.tokens,
                migration.pause,
                migration.how,
                migration.outcome,
                migration.reason[:1024],
            )
        )


def make_handoffs(
    config: FunctionConfig,
    client: Callable[[], CacheClient],
    model: Model,
    work: WorkCounter,
    released: Callable[[], None],
) -> Handoffs | None:
    """Return a worker's part in hand-offs; None for a function without hand-off. Raises `BadConfig`."""
    if not (name := config.handoff_name):
        return None
    return Handoffs(name, client, model, lambda: model.identity, seal(config.function_key_file), work, released)
