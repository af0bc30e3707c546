"""The events that residency handles and the actions that it decides on. Pure values.

`lease` and `asker` are the numbers of requests; `entry` is the number of one copy in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache_agent.errors import AgentError
from cache_agent.model.manifest import Manifest
from cache_agent.policy.quota import NO_ACCOUNT, Account

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseAsked:
    """A function asks for a model; `revision` is set where the function insists on one."""

    lease: int
    uri: str
    revision: str = ""
    account: Account = NO_ACCOUNT


@dataclass(frozen=True, slots=True)
class LeaseClosed:
    lease: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """The origin has answered; `revision` is set where this source was admitted before."""

    uri: str
    manifest: Manifest
    revision: str = ""


@dataclass(frozen=True, slots=True)
class ResolveFailed:
    uri: str
    error: AgentError


@dataclass(frozen=True, slots=True)
class Reserved:
    """Memory for every segment is reserved: fds can be handed out."""

    entry: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """All bytes are in memory, after `seconds`; loading them again would take as long."""

    entry: int
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class LoadFailed:
    entry: int
    error: AgentError


@dataclass(frozen=True, slots=True)
class Admitted:
    entry: int
    revision: str


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """`asker` gets `EvictDone` or `Refuse`."""

    asker: int
    uri: str


@dataclass(frozen=True, slots=True)
class PinAsked:
    """Keep the model at `uri`, or no longer; `asker` gets `PinDone` or `Refuse`."""

    asker: int
    uri: str
    pinned: bool
    account: Account = NO_ACCOUNT


@dataclass(frozen=True, slots=True)
class OfferAsked:
    """A function that outlived its agent offers the bytes that it maps; they are being examined."""

    lease: int
    uri: str
    account: Account = NO_ACCOUNT


@dataclass(frozen=True, slots=True)
class Offered:
    """The bytes were proved; `same` is the entry whose memory they are already, or 0."""

    lease: int
    uri: str
    manifest: Manifest
    revision: str
    same: int = 0


@dataclass(frozen=True, slots=True)
class OfferFailed:
    lease: int
    uri: str
    why: str


@dataclass(frozen=True, slots=True)
class Evicted:
    entry: int


Event = (
    LeaseAsked
    | LeaseClosed
    | Resolved
    | ResolveFailed
    | Reserved
    | Loaded
    | LoadFailed
    | Admitted
    | EvictAsked
    | PinAsked
    | OfferAsked
    | Offered
    | OfferFailed
    | Evicted
)


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolve:
    uri: str


@dataclass(frozen=True, slots=True)
class Load:
    entry: int
    manifest: Manifest
    uri: str


@dataclass(frozen=True, slots=True)
class Grant:
    lease: int
    entry: int


@dataclass(frozen=True, slots=True)
class Complete:
    """All bytes are there. `resident`: they were already when the lease was asked for."""

    lease: int
    entry: int
    resident: bool
    revision: str


@dataclass(frozen=True, slots=True)
class Admit:
    """Compute the revision of the bytes, off the critical path."""

    entry: int


@dataclass(frozen=True, slots=True)
class Announce:
    lease: int
    revision: str


@dataclass(frozen=True, slots=True)
class Refuse:
    lease: int
    error: AgentError


@dataclass(frozen=True, slots=True)
class Evict:
    entry: int
    why: str


@dataclass(frozen=True, slots=True)
class EvictDone:
    """`stays` says which copies are still held, and go as soon as they are not."""

    asker: int
    bytes: int
    stays: str = ""


@dataclass(frozen=True, slots=True)
class Adopt:
    """The offered bytes are the entry's from now on, and the lease holds it; `fresh` where the entry is new."""

    lease: int
    entry: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Orphan:
    """The offered bytes stay the function's own."""

    lease: int
    uri: str
    why: str


@dataclass(frozen=True, slots=True)
class PinDone:
    asker: int
    bytes: int


Action = Resolve | Load | Grant | Complete | Admit | Announce | Refuse | Evict | EvictDone | PinDone | Adopt | Orphan
