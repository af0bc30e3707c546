"""Makes a worker's part in hand-offs: it takes others' requests in, and gives its own away once it drains."""

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
from runtime.handoff.adopted import Work
from runtime.handoff.departure import Departure
from runtime.handoff.destination import Destination
from runtime.handoff.live import LiveEngine
from runtime.handoff.migration import MigrationReport
from runtime.handoff.pipe import Pipe
from runtime.handoff.relay import Relay
from runtime.handoff.reporter import Reporter
from runtime.resume.seal import Seal, seal
from runtime.resume.snapshot import VERSION, ReplicaIdentity


class Incoming:
    """One worker's. `model.engine` is a `LiveEngine` from here on."""

    def __init__(
        self,
        function: str,
        client: Callable[[], CacheClient],
        model: Model,
        place: Callable[[], ReplicaIdentity],
        sealing: Seal,
        work: Work,
        released: Callable[[], None],
    ) -> None:
        """`function` is the name that its replicas have in common; `work` counts what is moved here, and `released` is
        called when the engine is gone."""
        self._function, self._client, self._model, self._place, self._seal = function, client, model, place, sealing
        model.engine = live = LiveEngine(model.engine)
        self._owner = model.sessions.owner if model.sessions else f"worker-{os.getpid()}-{secrets.token_hex(8)}"
        self._reporter = Reporter(lambda items: report(client(), items))
        self._host = Destination(client, model, place, self._siblings, self._owner, sealing, work)
        self._departure = Departure(
            live, model.sessions, place, self._seek, lambda: not model.raw_read, released, self._report
        )
        self._host.begin()

    def depart(self) -> None:
        """Returns at once; asked again, it does nothing."""
        self._host.leave()
        self._departure.begin()

    def close(self, why: str, deadline: float) -> None:
        """End what is relayed, with an error after which it can be asked for again, and report all that has moved.

        Returns at `deadline`, on time.monotonic, at the latest; may be called again.
        """
        self._host.leave()
        self._departure.close(why, deadline)
        self._reporter.close(deadline)

    def _siblings(self) -> str:
        """Two workers that have it in common can go on with each other's requests."""
        place = self._place()
        if not place.revision:
            return ""
        parts = (VERSION, STATE_VERSION, place.engine, place.revision, place.tokenizer, place.adapter)
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
            return Relay(pipe, pipe.greet(siblings, self._owner), self._place())
        except BaseException:
            with pipe:
                raise

    def _report(self, told: MigrationReport) -> None:
        self._reporter.report(
            HandoffOutcome(
                self._function,
                told.id,
                self._owner,
                told.to,
                told.tokens,
                told.pause,
                told.how,
                told.outcome,
                told.reason[:1024],
            )
        )


def moving(
    config: FunctionConfig, client: Callable[[], CacheClient], model: Model, work: Work, released: Callable[[], None]
) -> Incoming | None:
    """None for a function whose requests stay where they are. Raises `BadConfig`."""
    if not (name := config.handoff_name):
        return None
    return Incoming(name, client, model, lambda: model.identity, seal(config.function_key_file), work, released)
