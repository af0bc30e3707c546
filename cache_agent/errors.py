"""The errors of the cache agent: a stable code on the wire, a sentence that says what to do, whether to try again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

log = logging.getLogger("glowplug.agent")

_NAMED = 5  # models that an error names, at most


class AgentError(Exception):
    """Root of everything the agent or its client reports.

    `code` never changes once released; `retryable` says whether the same call can succeed later without any change to
    model, settings or rights.
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
    """The caller cannot be identified now, because the Kubernetes API does not answer."""

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
        """Make a sentence of `text`, the models that take the room as (URI, a few words), and `rest`."""
        self._parts = text, holders, rest
        super().__init__(self.text_for(lambda _: True))

    def text_for(self, may_have: Callable[[str], bool]) -> str:
        """Return the sentence for a caller that may know of some models only; the other models are counted."""
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
    """No agent answers on the socket."""

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
    """The store of running requests' snapshots cannot be reached now."""

    code = "store_unavailable"
    retryable = True


class SnapshotTooLarge(AgentError):
    """A request's snapshot, or a function's snapshots together, would be larger than is allowed."""

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
    """Return the exception for an error frame; an unknown code becomes an `AgentError` that keeps the text."""
    return BY_CODE.get(code, AgentError)(text)


def translated(error: Exception, uri: str) -> AgentError:
    """Return an error with the model at `uri` as an `AgentError`; an unexpected one is logged with its traceback."""
    if isinstance(error, AgentError):
        return error
    log.error("unexpected error with %s", uri, exc_info=error)
    return InternalError(f"{uri}: the agent failed ({error!r}); its log has the traceback, please report it")
