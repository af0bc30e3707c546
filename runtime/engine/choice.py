"""Chooses the engine for a loaded model: batched where the model's attention allows, else one request at a time."""

from __future__ import annotations

import logging
from typing import Any

from cache_agent.limits import available_bytes
from runtime.config import FunctionConfig
from runtime.engine.attention import Unbatchable
from runtime.engine.base import Codec
from runtime.engine.batched import BatchedEngine
from runtime.engine.loop import UNWATCHED, EngineWatch
from runtime.engine.serial import SerialEngine

_log = logging.getLogger("glowplug.engine")


def choose(
    model: Any, codec: Codec, config: FunctionConfig, *, revision: str, threads: int, watch: EngineWatch = UNWATCHED
) -> tuple[BatchedEngine | SerialEngine, str]:
    """Return the engine, and the reason why it is not the batched one ("" if it is).

    Without a setting, keys and values may take half of what the container's limit leaves once the weights are there.
    """
    memory = config.kv_memory or available_bytes() // 2
    try:
        engine = BatchedEngine(
            model,
            codec,
            revision=revision,
            memory=memory,
            slots=config.slots,
            queue_size=config.queue,
            fixed=config.decode_rows,
            deterministic=config.deterministic,
            reuse=config.prefix_cache,
            threads=threads,
            watch=watch,
        )
    except Unbatchable as reason:
        _log.warning("requests are served one at a time: %s", reason)
        serial = SerialEngine(
            model,
            codec,
            revision=revision,
            memory=memory,
            slots=config.slots,
            queue_size=config.queue,
            threads=threads,
            watch=watch,
        )
        return serial, str(reason)
    tokens = memory // engine.shape.token_bytes
    _log.info("batched engine: %d MB hold the keys and values of %d tokens", memory >> 20, tokens)
    return engine, ""
