"""Makes models without weights: every layer and name is there, and no byte of a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.initialization import no_init_weights


def skeleton(kind: Any, config: Any, **more: Any) -> Any:
    """Return a model of class `kind` on the meta device; small tensors that the model itself computes may be on the
    processor."""
    try:
        with torch.device("meta"), _Counting(), no_init_weights():
            return kind._from_config(config, **more)
    except RuntimeError:  # the model combines tensors of both devices
        with torch.device("meta"), no_init_weights():
            return kind._from_config(config, **more)


class _Counting(TorchFunctionMode):
    """A mode in which `torch.arange` computes on the processor.

    On the meta device `arange` imports sympy, which takes a third of a second, for the few frequencies of a rotary
    embedding.
    """

    def __torch_function__(
        self, function: Any, _types: object, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function is torch.arange and named.get("device") is None:
            named = {**named, "device": "cpu"}
        return function(*arguments, **named)
