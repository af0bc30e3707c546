"""Errors of the cache agent: a stable code on the wire, a sentence that says what to do, and whether to try again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

log = logging.getLogger("glowplug.agent")

_NAMED = 5  # models that an error names


class AgentError(Exception):
    """Root of everything the agent or its client reports.

    `code` never changes once released; `retryable` says whether the same call can succeed later without anyone
    changing anything.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class InternalError(AgentError):
    """A fault of the agent itself; its log has the traceback."""

    code = "internal"


class BadModelURI(AgentError):
    """The model's URI has no scheme, an unknown one, or makes no sense."""

    code = "bad_uri"


class ModelNotFound(AgentError):
    """The origin has nothing at that URI."""

    code = "not_found"


class AccessDenied(AgentError):
    """The caller, or the agent towards the origin, has no right to the model."""

    code = "denied"


class IdentityUnavailable(AgentError):
    """Nobody can tell now who the caller is: the Kubernetes API does not answer."""

    code = "identity_unavailable"
    retryable = True


class OriginUnavailable(AgentError):
    """The origin does not answer, or broke off."""

    code = "origin_unavailable"
    retryable = True


class OriginChanged(AgentError):
    """The model's files were overwritten while they were being read."""

    code = "origin_changed"
    retryable = True


class WrongRevision(AgentError):
    """The origin's bytes are not the revision that was asked for."""

    code = "wrong_revision"


class BadCheckpoint(AgentError):
    """The files at the origin are no checkpoint that can be served: damaged, hostile, or of an unknown kind."""

    code = "bad_checkpoint"


class UnsafeCheckpoint(AgentError):
    """Only pickled weights are there; reading them would run code."""

    code = "unsafe_checkpoint"


class NoCapacity(AgentError):
    """The bytes do not fit, and nothing that could be evicted would make room."""

    code = "no_capacity"

    def __init__(self, text: str, holders: Sequence[tuple[str, str]] = (), rest: str = "") -> None:
        """`holders` are the models that take the room: (URI, a few words); between `text` and `rest`."""
        self._parts = text, holders, rest
        super().__init__(self.told(lambda _: True))

    def told(self, may_have: Callable[[str], bool]) -> str:
        """The sentence for somebody who may know of some models only."""
        text, holders, rest = self._parts
        words = [words for uri, words in holders if may_have(uri)][:_NAMED]
        if len(holders) > len(words):
            words.append(f"and {len(holders) - len(words)} more" if words else f"by {len(holders)} other models")
        return f"{text} ({'; '.join(words)}){rest}" if words else text + rest


class EvictRefused(AgentError):
    """The model is leased, pinned or still loading."""

    code = "in_use"


class ProtocolError(AgentError):
    """The peer sent something that is no frame, no message, or not allowed now."""

    code = "protocol"


class VersionMismatch(AgentError):
    """Client and agent speak different versions of the protocol; a function goes on with a private agent."""

    code = "version"


class AgentUnreachable(AgentError):
    """Nobody answers on the agent's socket."""

    code = "agent_unreachable"
    retryable = True


class LeaseLost(AgentError):
    """The agent went away before the weights were complete."""

    code = "lease_lost"
    retryable = True


class AgentTimeout(AgentError):
    """The agent answered too late."""

    code = "timeout"
    retryable = True


class StoreUnavailable(AgentError):
    """What is kept of running requests cannot be reached now."""

    code = "store_unavailable"
    retryable = True


class SnapshotTooLarge(AgentError):
    """More would be kept of a request, or of a function's requests, than may be."""

    code = "snapshot_too_large"


class SnapshotForged(AgentError):
    """A snapshot is not signed with the cluster's key, or as something else than it is taken for."""

    code = "snapshot_forged"


class NoDestination(AgentError):
    """No other worker can go on with this one's requests now."""

    code = "no_destination"
    retryable = True


class BadSetting(AgentError):
    """A setting of the agent is missing or has no sense."""

    code = "bad_config"


BY_CODE: dict[str, type[AgentError]] = {
    cls.code: cls
    for cls in (
        InternalError,
        BadModelURI,
        ModelNotFound,
        AccessDenied,
        IdentityUnavailable,
        OriginUnavailable,
        OriginChanged,
        WrongRevision,
        BadCheckpoint,
        UnsafeCheckpoint,
        NoCapacity,
        EvictRefused,
        ProtocolError,
        VersionMismatch,
        AgentUnreachable,
        LeaseLost,
        AgentTimeout,
        StoreUnavailable,
        SnapshotTooLarge,
        SnapshotForged,
        NoDestination,
        BadSetting,
    )
}


def from_wire(code: str, text: str) -> AgentError:
    """The exception for an error frame; a code of a newer agent becomes an `AgentError` that keeps its text."""
    return BY_CODE.get(code, AgentError)(text)


def translated(error: Exception, uri: str) -> AgentError:
    """What a caller is told of an error with the model at `uri`; one that nobody foresaw goes to the log, too."""
    if isinstance(error, AgentError):
        return error
    log.error("unexpected error with %s", uri, exc_info=error)
    return InternalError(f"{uri}: the agent failed ({error!r}); its log has the traceback, please report it")
