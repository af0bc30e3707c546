"""Every way to write into shared weights is a named error, leaves them as they were, and reading stays as it is."""

from __future__ import annotations

import copy
import mmap
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from runtime.errors import SharedWeightsError  # noqa: E402
from runtime.worker.guard import WriteGuard  # noqa: E402

SHAPE = (8, 16)


class Shared(NamedTuple):
    guard: WriteGuard
    weight: Any  # float32, on pages that cannot be written
    counts: Any  # int64, likewise
    content: Callable[[], bytes]
    memory: mmap.mmap


@pytest.fixture
def shared() -> Shared:
    """Two tensors over a read-only mapping, as `weights.Weights` makes them: a write that came through would crash."""
    fd = os.memfd_create("test-weights")
    size = 2 * mmap.PAGESIZE
    os.write(fd, torch.arange(128, dtype=torch.float32).numpy().tobytes().ljust(mmap.PAGESIZE, b"\0"))
    os.write(fd, torch.arange(128, dtype=torch.int64).numpy().tobytes().ljust(mmap.PAGESIZE, b"\0"))
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        weight = torch.frombuffer(memory, dtype=torch.float32, count=128).view(SHAPE)
        counts = torch.frombuffer(memory, dtype=torch.int64, count=128, offset=mmap.PAGESIZE).view(SHAPE)
    start = weight.data_ptr()
    guard = WriteGuard([(start, start + size)])
    return Shared(guard, torch.nn.Parameter(weight, requires_grad=False), counts, lambda: memory[:], memory)


def _optimizer(weight: Any) -> None:
    weight.grad = torch.ones(SHAPE)
    torch.optim.SGD([weight], lr=0.1).step()


def _foreach_optimizer(weight: Any) -> None:
    weight.grad = torch.ones(SHAPE)
    torch.optim.AdamW([weight], lr=0.1, foreach=True).step()


def _set_item(weight: Any) -> None:
    weight[0, 0] = 1.0


def _masked_item(weight: Any) -> None:
    weight[weight > 3] = 0.0


def _augmented(weight: Any) -> None:
    weight += 1


def _inference(weight: Any) -> None:
    with torch.inference_mode():
        weight.zero_()


def _numpy(weight: Any) -> None:
    weight.numpy()[0, 0] = 1.0


WRITES: dict[str, Callable[[Any], object]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(SHAPE)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(2),
    "mul_ by keyword": lambda w: w.mul_(other=2),
    "normal_": lambda w: w.normal_(),
    "init": lambda w: torch.nn.init.xavier_uniform_(w),
    "clamp_": lambda w: w.clamp_(0, 1),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), torch.ones(1, 16)),
    "scatter_": lambda w: w.scatter_(0, torch.zeros(1, 16, dtype=torch.int64), 1.0),
    "addmm_": lambda w: w.addmm_(torch.ones(8, 4), torch.ones(4, 16)),
    "out=": lambda w: torch.add(torch.zeros(SHAPE), 1, out=w),
    "matmul out=": lambda w: torch.mm(torch.ones(8, 4), torch.ones(4, 16), out=w),
    "sort out=": lambda w: torch.sort(torch.ones(SHAPE), out=(w, torch.empty(SHAPE, dtype=torch.int64))),
    "setitem": _set_item,
    "setitem by mask": _masked_item,
    "+=": _augmented,
    ".data": lambda w: w.data.add_(1),
    "detach": lambda w: w.detach().add_(1),
    "view": lambda w: w.view(-1)[3:5].fill_(0),
    "transposed view": lambda w: w.t()[1].fill_(0),
    "another dtype": lambda w: w.view(torch.int32).fill_(0),
    "as_strided": lambda w: w.as_strided((2,), (1,)).fill_(0),
    "unbind": lambda w: w.unbind(0)[1].zero_(),
    "foreach": lambda w: torch._foreach_add_([torch.zeros(2), w], 1.0),
    "foreach copy": lambda w: torch._foreach_copy_([w], [torch.zeros(SHAPE)]),
    "optimizer": _optimizer,
    "foreach optimizer": _foreach_optimizer,
    "inference mode": _inference,
    "embedding renorm": lambda w: torch.nn.functional.embedding(torch.tensor([7]), w, max_norm=0.1),
    "dropout in place": lambda w: torch.nn.functional.dropout(w, 0.5, training=True, inplace=True),
    "relu_": lambda w: torch.relu_(w),
    "module": lambda w: torch.nn.ReLU(inplace=True)(w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_is_refused_and_changes_nothing(shared: Shared, write: Callable[[Any], object]) -> None:
    before = shared.content()
    with shared.guard.scope():
        shared.guard.arm()
        with torch.no_grad(), pytest.raises(SharedWeightsError) as caught:
            write(shared.weight)
    assert shared.content() == before
    assert "Clone the tensor first, or set GLOWPLUG_PRIVATE_WEIGHTS=1" in caught.value.text


def test_numpy_names_the_fault_itself(shared: Shared) -> None:
    with shared.guard.scope():
        shared.guard.arm()
        with pytest.raises(ValueError, match="read-only"):
            _numpy(shared.weight)
        own = shared.weight.clone().numpy()
        own[0, 0] = 1.0


def test_the_values_that_load_state_dict_would_copy_are_refused(shared: Shared) -> None:
    """torch reports what it caught as a RuntimeError of its own; the sentence is in it, and nothing was written."""
    module = torch.nn.Linear(16, 8, bias=False)
    module.weight = shared.weight
    before = shared.content()
    with shared.guard.scope():
        shared.guard.arm()
        with pytest.raises((SharedWeightsError, RuntimeError), match="GLOWPLUG_PRIVATE_WEIGHTS=1"):
            module.load_state_dict({"weight": torch.zeros(SHAPE)})
    assert shared.content() == before


def test_reading_is_as_without_a_guard(shared: Shared) -> None:
    weight, x = shared.weight, torch.ones(2, 16)

    def read() -> list[Any]:
        return [
            torch.nn.functional.linear(x, weight),
            weight.sum(),
            weight[2:4].clone(),
            weight.softmax(-1),
            torch.nn.functional.embedding(torch.tensor([1]), weight),
            weight.to(torch.float64),
            torch.cat([weight, weight]),
            torch.tensor(weight.numpy().copy()),
            copy.deepcopy(weight),
        ]

    expected = read()
    with shared.guard.scope():
        shared.guard.arm()
        found = read()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_tensors_of_ones_own_may_be_written(shared: Shared) -> None:
    with shared.guard.scope():
        shared.guard.arm()
        own = shared.weight.clone()
        own.add_(1)
        own[0] = 0
        torch.add(shared.weight, 1, out=own)
        own.numpy()[0, 0] = 5
        torch._foreach_add_([own], 1.0)
    assert torch.equal(own[1:], shared.weight[1:] + 2)


def test_whole_numbers_are_protected_alike(shared: Shared) -> None:
    with shared.guard.scope():
        shared.guard.arm()
        with pytest.raises(SharedWeightsError):
            shared.counts.add_(1)


def test_the_end_of_the_scope_ends_the_guard(shared: Shared) -> None:
    with shared.guard.scope():
        shared.guard.arm()
        shared.guard.arm()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert shared.weight.numpy().flags.writeable, "nobody is watching outside of a scope"


def test_the_guard_outlives_an_inner_scope(shared: Shared) -> None:
    with shared.guard.scope():
        shared.guard.arm()
        with shared.guard.scope():
            shared.guard.arm()
        with pytest.raises(SharedWeightsError):
            shared.weight.zero_()


def test_an_exception_ends_the_guard_as_well(shared: Shared) -> None:
    with pytest.raises(SharedWeightsError), shared.guard.scope():  # noqa: PT012  what is tested is where it ends
        shared.guard.arm()
        shared.weight.zero_()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_scope_in_which_nobody_asked_for_the_model_costs_nothing(shared: Shared) -> None:
    with shared.guard.scope():
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_whoever_kept_the_model_is_still_watched(shared: Shared) -> None:
    """`load` keeps it in a variable of its own, and `handle` writes into it without asking for it again."""
    with shared.guard.scope():
        shared.guard.arm()
        kept = shared.weight
    with shared.guard.scope(), pytest.raises(SharedWeightsError):
        kept.zero_()


def test_other_threads_are_not_watched(shared: Shared) -> None:
    seen: list[object] = []

    def look() -> None:
        seen.append(torch.utils._python_dispatch._get_current_dispatch_mode())
        seen.append(shared.weight.sum().item())

    with shared.guard.scope():
        shared.guard.arm()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [None, sum(range(128))]


def test_what_belongs_to_the_ranges(shared: Shared) -> None:
    guard, weight = shared.guard, shared.weight
    assert guard.shares(weight)
    assert guard.shares(weight[1:])
    assert not guard.shares(weight.clone())
    assert not guard.shares(weight.to("meta"))
    assert not guard.shares(torch.empty(0))
    assert not guard.shares(weight.to_sparse())
    assert not WriteGuard([]).shares(weight)


def test_ranges_are_half_open() -> None:
    tensor = torch.zeros(4, dtype=torch.float32)
    address = tensor.data_ptr()
    assert WriteGuard([(address, address + 16)]).shares(tensor)
    assert not WriteGuard([(address - 16, address)]).shares(tensor)
    assert WriteGuard([(0, 16), (address, address + 1), (address + 64, address + 128)]).shares(tensor)
