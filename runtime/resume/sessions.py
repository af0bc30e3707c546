"""Makes a worker's `Sessions` as its settings have it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.snapshots import SnapshotClient
from runtime.config import FunctionConfig
from runtime.function.model import Model
from runtime.resume.checkpoint import Sessions
from runtime.resume.seal import seal
from runtime.resume.snapshot import ReplicaIdentity

_EVERY = 16  # tokens of a request after which it is kept again


def book(config: FunctionConfig, client: Callable[[], CacheClient], model: Model) -> Sessions | None:
    """None for a function that keeps no requests. Raises `BadConfig`."""
    if not config.checkpoints:
        return None
    return Sessions(
        SnapshotClient(client),
        config.checkpoints,
        seal(config.function_key_file),
        lambda: place_of(model),
        owner=f"worker-{os.getpid()}-{secrets.token_hex(8)}",
        every=_EVERY,
    )


def place_of(model: Model) -> ReplicaIdentity:
    """What a worker with this model is now, to those who want to go on with its requests."""
    engine = model.engine
    return ReplicaIdentity(engine.kind, model.revision, model.tokenizer_digest, "", getattr(engine, "arithmetic", ""))
