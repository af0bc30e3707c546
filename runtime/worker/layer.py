"""The contract of the warm layer that a worker may be forked from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cache_agent.client.lease import KnownManifest, Lease
    from cache_agent.web.wsgi import Settings
    from runtime.http.application import Prepared
    from runtime.layers.keys import Level
    from runtime.worker.weights import AssembledModel, Weights


class WarmLayer(Protocol):
    """A warm layer, and the parts that it has ready for a worker. A `shared` one has workers in several containers."""

    @property
    def level(self) -> Level: ...

    @property
    def http(self) -> tuple[Prepared, Settings] | None: ...

    @property
    def known(self) -> KnownManifest | None: ...

    @property
    def shared(self) -> bool: ...

    def parts(self, lease: Lease) -> tuple[Weights, AssembledModel] | None:
        """Return weights and model, if their bytes are the very ones of `lease`; else None."""
        ...
