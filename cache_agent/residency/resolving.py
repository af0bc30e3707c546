"""Resolves a URI to the source that it names now, by its origin or, while the origin does not answer, by memory.

The last answer of an origin stands in for the origin for `GLOWPLUG_STALE` seconds: the model is then taken from this
node's SSD, or from another node, and the start's ledger and the log say since when the origin could not be asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from cache_agent.cluster.directory import Directory
from cache_agent.cluster.peers import Peers
from cache_agent.config import AgentConfig
from cache_agent.errors import OriginUnavailable
from cache_agent.ledger import Ledger
from cache_agent.model.checkpoint import Description, describe
from cache_agent.model.origin import Origin
from cache_agent.model.uri import ModelURI, parse_uri
from cache_agent.residency.confirmed import Confirmed
from cache_agent.residency.retention import Retention
from cache_agent.residency.revisions import Revisions

log = logging.getLogger("glowplug.agent")


class Resolution(NamedTuple):
    """A source, with its origin; `phases` are the spans so far of the load that may follow."""

    description: Description
    origin: Origin
    phases: Ledger
    revision: str = ""
    answers: bool = True  # the origin, when it was asked


class Resolver:
    """The agent's answers to the question which source a URI names. Any thread."""

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

        Another node's description of a source is used only where `config.peer_witnesses` nodes state the revision.
        """
        self._stale, self._witnesses = config.stale, config.peer_witnesses
        self._open_origin, self._revisions, self._retention = open_origin, revisions, retention
        self._directory, self._peers = directory, peers
        self._confirmed = confirmed or Confirmed()

    def resolve(self, uri: str) -> Resolution:
        """Ask the origin, or take its last answer. Raises what the origin does, where no last answer is usable."""
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
        """Return the last answer of the origin and its age in seconds, or None where that is unknown or too old."""
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
        described = self._peers.describe(source)
        return None if described is None or described.source.uri != uri else (described, age)
