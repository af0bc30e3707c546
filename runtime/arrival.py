"""Lets a model run while its weights still arrive: every stage waits for the bytes of its own parameters, no others.

    on the wire   ░░░░ embedding ░░ layer 0 ░░ layer 1 ░░ … ░░ head        (segments are laid out in this order)
    first answer       └ embedding ─ layer 0 ─ layer 1 ─ …  each begins as soon as its last byte is verified

The hooks that wait are taken off again, each at its first call after everything is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cache_agent.client import Lease
from runtime.weights import Weights

# Models that use a parameter only in the forward pass of the module, or the layer, that has it: seen to be so, test by
# test. One that reads a weight elsewhere would compute with bytes that are not there, so all others wait for the whole.
KNOWN = frozenset({"GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})

_LOOK = 1.0  # seconds; whoever follows the lease ends every wait, this only bounds a lost wake-up

Need = tuple[tuple[int, int], ...]
"""(segment, end) pairs: the first `end` bytes of each of these segments have to be there."""


class Arrival:
    """How far the bytes of one lease are. One thread follows the lease, any may wait."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._ready = [0] * len(sizes)
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.complete = False

    def follow(self, lease: Lease, deadline: float, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Reads the lease's messages until all bytes are verified; whoever waits here goes on, or hears of the error.

        `deadline` on time.monotonic. Raises what `Lease.wait_ready` does.
        """

        def progress(done: int, total: int) -> None:
            self._advance(lease.arrived)
            if on_progress is not None:
                on_progress(done, total)

        try:
            lease.wait_ready(deadline, progress)
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise
        self._advance(self._sizes)

    def _advance(self, ready: Sequence[int]) -> None:
        with self._changed:
            self._ready = list(ready)
            self.complete = all(have >= size for have, size in zip(self._ready, self._sizes, strict=True))
            self._changed.notify_all()

    def wait(self, need: Need) -> None:
        """Returns once these bytes are verified. Raises the error that ended the lease before."""
        with self._changed:
            while not all(self._ready[segment] >= end for segment, end in need):
                if self._error is not None:
                    raise self._error
                self._changed.wait(_LOOK)


def gate(model: Any, weights: Weights, arrival: Arrival) -> bool:
    """Makes each stage of the model wait for its bytes; False, and nothing changed, for a model not known to allow it.

    Until `arrival` is complete the model may only be used through its own forward pass.
    """
    if type(model).__name__ not in KNOWN:
        return False
    places = {
        weights.tensors[stored.name].data_ptr(): (stored.segment, stored.offset + stored.size)
        for stored in weights.manifest.tensors
        if stored.size
    }
    needs: list[tuple[torch.nn.Module, Need]] = []
    covered: set[int] = set()
    for stage in _stages(model):
        ends: dict[int, int] = {}
        for tensor in (*stage.parameters(), *stage.buffers()):
            if (place := places.get(tensor.data_ptr())) is not None:
                covered.add(tensor.data_ptr())
                ends[place[0]] = max(ends.get(place[0], 0), place[1])
        if ends:
            needs.append((stage, tuple(ends.items())))
    if covered != places.keys():
        return False
    for stage, need in needs:
        _hook(stage, need, arrival)
    return True


def _stages(model: Any) -> Iterator[torch.nn.Module]:
    """What runs one after the other: the modules at the top, and each layer of a list of layers."""
    base = model.base_model
    for child in (*(child for child in model.children() if child is not base), *base.children()):
        yield from child if isinstance(child, torch.nn.ModuleList) else (child,)


def _hook(stage: torch.nn.Module, need: Need, arrival: Arrival) -> None:
    def before(_module: torch.nn.Module, _arguments: object) -> None:
        if not arrival.complete:
            arrival.wait(need)
        else:
            handle.remove()

    handle = stage.register_forward_pre_hook(before)
