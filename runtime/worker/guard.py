"""Owns the protection of shared weights: a write to them is a named error in the thread that tries, not a segfault.

The pages are read-only in any case. A handler that reads `context.model.raw` arms the guard for its own thread: from
then on, operators that write to shared weights are refused (an operator's schema names the arguments that it writes
to). Handlers may keep references to the weights, so all later scopes are armed from their beginning. Functions that
never read `raw` pay nothing, nor does the engine's thread.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.errors import SharedWeightsError


class WriteGuard:
    """A guard for the memory of shared weights. `arm` protects it from the calling thread until the end of `scope`."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """`ranges` are (first address, one past the last) of each mapping."""
        ordered = sorted(ranges)
        self._starts = [start for start, _ in ordered]
        self._ends = [end for _, end in ordered]
        self._local = threading.local()
        self._handed_out = False

    def shares(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor's memory belongs to the shared weights."""
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return False
        address = tensor.untyped_storage().data_ptr()
        position = bisect.bisect_right(self._starts, address) - 1
        return position >= 0 and address < self._ends[position]

    def arm(self) -> None:
        """Check every operator of this thread from now on, until the end of its scope or of the thread."""
        self._handed_out = True
        if getattr(self._local, "modes", None):
            return
        modes = (_NoWritableArrays(self), _NoWrites(self))
        for mode in modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._local.modes = modes

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Arm the thread if any handler has read the weights, and disarm it at the end unless it was armed before."""
        armed_before = bool(getattr(self._local, "modes", None))
        if self._handed_out:
            self.arm()
        try:
            yield
        finally:
            modes = getattr(self._local, "modes", None)
            if modes and not armed_before:
                for mode in reversed(modes):
                    mode.__exit__(None, None, None)
                self._local.modes = None


class _NoWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, guard: WriteGuard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._guard = guard

    def __torch_dispatch__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        positions, names = _written(func)
        for value in [args[n] for n in positions if n < len(args)] + [kwargs[n] for n in names if n in kwargs]:
            for tensor in _tensors(value):
                if self._guard.shares(tensor):
                    raise SharedWeightsError(
                        f"{func} would write into the model's weights ({tuple(tensor.shape)}), which all functions of "
                        "this node share and which are read-only. Clone the tensor first, or set "
                        "GLOWPLUG_PRIVATE_WEIGHTS=1 for a copy of its own"
                    )
        return func(*args, **kwargs)


class _NoWritableArrays(TorchFunctionMode):
    """A mode that makes the arrays of `tensor.numpy()` read-only: writes to them are no operators of torch."""

    def __init__(self, guard: WriteGuard) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.numpy and self._guard.shares(args[0]):
            result.flags.writeable = False
        return result


@lru_cache(maxsize=4096)
def _written(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return positions and names of the arguments that an operator writes to."""
    arguments = func._schema.arguments
    written = [
        (n, argument.name)
        for n, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(n for n, _ in written), tuple(name for _, name in written)


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    return (item for item in value if isinstance(item, torch.Tensor)) if isinstance(value, (list, tuple)) else ()
