"""Assembles a worker's model from a lease, from modules, and from the parts that a layer has ready.

lease ──► modules ──► model on the lease's memory, while bytes still arrive ──► all bytes ──► engine ──► Assembled
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache_agent.client.lease import Lease
from cache_agent.ledger import Ledger
from cache_agent.model.manifest import model_config
from runtime.config import FunctionConfig
from runtime.errors import StaleLayer
from runtime.http.lifecycle import Lifecycle
from runtime.worker.imports import Importing
from runtime.worker.leasing import Leasing
from runtime.worker.reporting import Reporting

if TYPE_CHECKING:
    from runtime.function.model import Model
    from runtime.worker.layer import WarmLayer
    from runtime.worker.weights import AssembledModel, Weights

log = logging.getLogger("glowplug.worker")


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model that is ready to serve, its weights, their lease, and the `kind` of model that the checkpoint names."""

    model: Model
    weights: Weights
    lease: Lease
    kind: str


class Assembly:
    """The assembly of one worker's model. `assemble` is for the thread that has the lease."""

    def __init__(
        self,
        config: FunctionConfig,
        ledger: Ledger,
        lifecycle: Lifecycle,
        leasing: Leasing,
        reporting: Reporting,
        warm: WarmLayer | None,
        broken: Callable[[str], None],
    ) -> None:
        """Without a layer, `warm`, begin to map libraries. `broken` takes the reason if the engine breaks."""
        self._config, self._ledger, self._lifecycle = config, ledger, lifecycle
        self._leasing, self._reporting = leasing, reporting
        self._warm = warm
        self._broken = broken
        self._imports = Importing(_import_model_code, lean=config.lean_imports) if warm is None else None
        self._whole: Lease | None = None  # the lease whose bytes are all there

    def import_modules(self) -> None:
        """Begin to import the modules that a layer would have; return at once."""
        if self._imports is not None:
            self._imports.begin()

    def assemble(self, lease: Lease, deadline: float) -> Assembled:
        """Return the model of `lease`, ready to serve. Raise any `AgentError` or `FunctionError`.

        `deadline`, on time.monotonic, is for the arrival of the weights.
        """
        self._lifecycle.phase = "imports"
        if self._imports is not None:
            self._imports.wait()
            self._ledger.add("imports", self._imports.started, self._imports.ended)
        import torch

        from cache_agent.limits import cpu_quota
        from runtime.worker import weights

        with self._ledger.span("model code"):
            weights.preload(lease.manifest)
        self._lifecycle.phase = "model"
        threads = self._config.threads or cpu_quota()
        torch.set_num_threads(threads)
        with self._ledger.span("attach"):
            # The bytes still arrive; the model needs only their addresses.
            mapped, loaded = self._ready_parts(lease) or self._put_together(lease, deadline)
        self._await_weights(lease, deadline)
        if not self._config.private_weights:
            threading.Thread(target=lambda: deque(mapped.populate(), 0), name="pages", daemon=True).start()
        self._lifecycle.phase = "engine"
        log.info("%s: weights %s, from %s", self._config.served_name, loaded.how, lease.tier)
        model = self._model(lease, mapped, loaded, threads)
        self._reporting.lease = lease
        return Assembled(model, mapped, lease, str(model_config(lease.manifest.files).get("model_type", "")))

    def _model(self, lease: Lease, mapped: Weights, loaded: AssembledModel, threads: int) -> Model:
        """Return a `Model` of transformers' model, with an engine that has begun to run."""
        from runtime.engine.choice import choose
        from runtime.engine.loop import EngineWatch
        from runtime.engine.serial import TokenizerCodec
        from runtime.function.model import Model
        from runtime.protocol.parameters import sampling_defaults

        begun = time.monotonic_ns()
        codec = TokenizerCodec(loaded.tokenizer, loaded.eos)
        watch = EngineWatch(self._first_token, self._broken)
        engine, serial = choose(
            loaded.model, codec, self._config, revision=lease.revision, threads=threads, watch=watch
        )
        self._ledger.add(f"engine, one request at a time: {serial}" if serial else "engine", begun)
        return Model(
            self._config.served_name,
            lease.revision,
            codec,
            engine,
            tokenizer=loaded.tokenizer,
            raw=loaded.model,
            raw_guard=None if self._config.private_weights else mapped.guard.arm,
            defaults=sampling_defaults(loaded.generation_config),
            deterministic=self._config.deterministic,
            tokenizer_digest=loaded.tokenizer_digest,
        )

    def _ready_parts(self, lease: Lease) -> tuple[Weights, AssembledModel] | None:
        """Return the parts that the layer has assembled already; None if it has none, or those of another model."""
        if self._warm is None or self._config.private_weights:
            return None
        parts = self._warm.parts(lease)
        if parts is None and self._reporting.kind == "model":
            if self._warm.shared:  # a worker that may not have the layer's model must not have it in memory, either
                raise StaleLayer("the pool's model is another one than the agent has now; another worker starts")
            log.info("the warm model is another one than the agent has now: it is put together anew")
            self._reporting.kind = "lang"
        return parts

    def _put_together(self, lease: Lease, deadline: float) -> tuple[Weights, AssembledModel]:
        from runtime.worker import weights

        mapped = weights.Weights(lease)
        loaded = weights.assemble(
            mapped, private=self._config.private_weights, whole=lambda: self._await_weights(lease, deadline)
        )
        return mapped, loaded

    def _await_weights(self, lease: Lease, deadline: float) -> None:
        """Return once all bytes of `lease` are there; return at once if they were awaited before."""
        if self._whole is lease:
            return
        self._lifecycle.phase = "weights"
        with self._ledger.span("weights"):
            lease.wait_ready(deadline, self._on_progress)
        self._whole = lease
        self._leasing.arrived(lease)
        self._ledger.extend(lease.spans)
        self._lifecycle.progress = (lease.manifest.nbytes, lease.manifest.nbytes)

    def _first_token(self, asked: int) -> None:
        self._ledger.add("first token", asked)

    def _on_progress(self, done: int, total: int) -> None:
        self._lifecycle.progress = (done, total)


def _import_model_code() -> None:
    from runtime.engine import choice, serial  # noqa: F401
    from runtime.worker import weights  # noqa: F401
