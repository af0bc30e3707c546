"""What a URI names now: asked of its origin, and of what is remembered while that does not answer.

An alias that its origin confirmed a while ago is better than no answer, for as long as the operator finds it so: the
model is then taken from this node's SSD, or from another node, and ledger and log say since when nobody looked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cache_agent.cluster.directory import Directory
from cache_agent.cluster.peers import Peers
from cache_agent.config import AgentConfig
from cache_agent.errors import OriginUnavailable
from cache_agent.ledger import Ledger
from cache_agent.model.checkpoint import Description, describe
from cache_agent.model.origin import Origin
from cache_agent.model.uri import ModelURI, parse_uri
from cache_agent.residency.confirmed import Confirmed
from cache_agent.residency.leases import Resolution
from cache_agent.residency.retention import Retention
from cache_agent.residency.revisions import Revisions

log = logging.getLogger("glowplug.agent")


class Resolver:
    """Any thread."""

    def __init__(
        self,
        open_origin: Callable[[ModelURI], Origin],
        revisions: Revisions,
        retention: Retention,
        directory: Directory,
        peers: Peers | None,
        config: AgentConfig,
        confirmed: Confirmed | None = None,
    ) -> None:
        """With `config.stale` 0 only the origin is believed.

        What another node describes counts only where as many as `config.peer_witnesses` said which revision has to
        come out.
        """
        self._stale, self._witnesses = config.stale, config.peer_witnesses
        self._open_origin, self._revisions, self._retention = open_origin, revisions, retention
        self._directory, self._peers = directory, peers
        self._confirmed = confirmed or Confirmed()

    def resolve(self, uri: str) -> Resolution:
        """Raises what the origin does, when nothing stands in for it."""
        phases = Ledger("agent")
        start = time.monotonic_ns()
        origin = self._open_origin(parse_uri(uri))
        answers = True
        try:
            description = describe(origin)
        except OriginUnavailable as error:
            found = self._remembered(uri)
            if found is None:
                raise
            description, answers = found[0], False
            since = f"nobody could ask for {found[1]:.0f} s"
            log.warning("%s; going on with what it had: %s", error, since)
            phases.add(f"resolve, its origin does not answer: {since}", start)
        else:
            phases.add("resolve", start)
            self._confirmed.say(uri, description.source.id)
            self._directory.validated(uri, description.source.id, self._confirmed.now())
            self._retention.validated(description.source.id)
        return Resolution(description, origin, phases, self._revisions.of(description.source.id), answers)

    def _remembered(self, uri: str) -> tuple[Description, float] | None:
        """What the origin said last, and how many seconds ago."""
        if not self._stale:
            return None
        stored = self._retention.find(uri)
        if stored is not None and (found := self._retention.description(stored.index.source)) is not None:
            description, when = found
            if (age := self._confirmed.age(uri, stored.index.source, when)) <= self._stale:
                return description, age
        source, when = self._directory.validation(uri, self._confirmed.now())
        if not source or self._peers is None or (age := self._confirmed.age(uri, source, when)) > self._stale:
            return None
        if not self._revisions.of(source) and not self._revisions.stated(source, self._witnesses):
            return None
        told = self._peers.describe(source)
        return None if told is None or told.source.uri != uri else (told, age)
