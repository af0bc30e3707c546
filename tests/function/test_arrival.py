"""A model runs while its weights arrive: never with a byte that is not there, and with the same result."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cache_agent.errors import LeaseLost  # noqa: E402
from runtime.arrival import KNOWN, Arrival, gate  # noqa: E402
from runtime.weights import Weights, assemble_model  # noqa: E402

ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt2")
IDS = torch.tensor([[5, 17, 99, 300, 42, 7, 7, 255]])
PIECES = 60


class Slow:
    """A lease whose bytes come piece by piece, when `go` is set; until then they are ones: NaN in every dtype."""

    def __init__(self, whole: Any) -> None:
        self.manifest, self.arrived = whole.manifest, [0] * len(whole.segments)
        self._whole = whole.segments
        self.segments = [os.memfd_create("slow") for _ in whole.segments]
        for fd, size in zip(self.segments, self.manifest.segments, strict=True):
            os.pwrite(fd, b"\xff" * size, 0)
        self.go = threading.Semaphore(0)
        self.error: Exception | None = None

    def wait_ready(self, deadline: float, on_progress: Callable[[int, int], None]) -> None:
        for number, (fd, size) in enumerate(zip(self.segments, self.manifest.segments, strict=True)):
            step = size // PIECES + 1
            for start in range(0, size, step):
                assert self.go.acquire(timeout=deadline - time.monotonic())
                if self.error is not None:
                    raise self.error
                os.pwrite(fd, os.pread(self._whole[number], min(step, size - start), start), start)
                self.arrived[number] = min(size, start + step)
                on_progress(sum(self.arrived), self.manifest.nbytes)


@pytest.fixture
def slow(lease: Callable[..., Any], random_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Any]:
    made: list[Slow] = []

    def make(**options: Any) -> Slow:
        directory = random_checkpoint(tmp_path / "m", **options)
        whole = lease({path.name: path.read_bytes() for path in directory.iterdir()})
        made.append(Slow(whole))
        made[-1].reference = assemble_model(Weights(whole))  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for one in made:
        for fd in one.segments:
            os.close(fd)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


class InBackground:
    """A call on a thread of its own; `result` waits for what it returned or raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.value: Any = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.value = work()
        except Exception as error:
            self.value = error

    def result(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.value

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_logits_as_with_all_bytes_there(arch: str, dtype: str, tied: bool, slow: Callable[..., Slow]) -> None:
    lease = slow(arch=arch, dtype=dtype, tied=tied)
    weights = Weights(lease)  # type: ignore[arg-type]
    arrival = Arrival(lease.manifest.segments)
    model = assemble_model(weights)
    assert gate(model, weights, arrival)
    reached: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: reached.append(name))
    follower = InBackground(lambda: arrival.follow(lease, time.monotonic() + 30))  # type: ignore[arg-type]
    answer = InBackground(lambda: logits(model))
    for _ in range(len(lease.segments) * PIECES - 1):
        lease.go.release()
        time.sleep(0.0005)  # lets the model run as far as it can; the result must not depend on it
    deadline = time.monotonic() + 10
    while not reached and time.monotonic() < deadline:
        time.sleep(0.005)
    assert reached, "stages ran although the last bytes are on their way"
    lease.go.release()
    found = answer.result()
    assert follower.result() is None
    assert torch.equal(found, logits(lease.reference)), "not one byte was used before it was there"  # type: ignore[attr-defined]


def test_nothing_runs_before_its_bytes(slow: Callable[..., Slow]) -> None:
    lease = slow(dtype="f32")
    weights = Weights(lease)  # type: ignore[arg-type]
    arrival = Arrival(lease.manifest.segments)
    model = assemble_model(weights)
    assert gate(model, weights, arrival)
    reached: list[str] = []
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: reached.append(str(number)))
    answer = InBackground(lambda: logits(model))
    ends = [
        max(t.offset + t.size for t in lease.manifest.tensors if f"layers.{n}." in t.name) for n in range(len(layers))
    ]
    arrival._advance([ends[0] - 1])
    time.sleep(0.05)
    assert reached == []
    arrival._advance([ends[0]])
    deadline = time.monotonic() + 10
    while reached != ["0"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert reached == ["0"]
    assert not answer.over
    arrival._advance(lease.manifest.segments)
    answer.result()


def test_whoever_waits_hears_why_nothing_comes(slow: Callable[..., Slow]) -> None:
    lease = slow(dtype="f32")
    weights = Weights(lease)  # type: ignore[arg-type]
    arrival = Arrival(lease.manifest.segments)
    model = assemble_model(weights)
    assert gate(model, weights, arrival)
    follower = InBackground(lambda: arrival.follow(lease, time.monotonic() + 30))  # type: ignore[arg-type]
    answer = InBackground(lambda: logits(model))
    lease.error = LeaseLost("the agent went away")
    lease.go.release()
    assert isinstance(follower.result(), LeaseLost)
    assert isinstance(answer.result(), LeaseLost)


def test_the_hooks_go_when_everything_is_there(slow: Callable[..., Slow]) -> None:
    lease = slow(dtype="f32")
    weights = Weights(lease)  # type: ignore[arg-type]
    arrival = Arrival(lease.manifest.segments)
    model = assemble_model(weights)
    assert gate(model, weights, arrival)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) > len(model.model.layers)
    for _ in range(len(lease.segments) * PIECES):
        lease.go.release()
    arrival.follow(lease, time.monotonic() + 30)  # type: ignore[arg-type]
    logits(model)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_a_model_that_is_not_known_is_left_alone(slow: Callable[..., Slow]) -> None:
    lease = slow(dtype="f32")
    weights = Weights(lease)  # type: ignore[arg-type]
    model = assemble_model(weights)
    other = type("OtherForCausalLM", (type(model),), {})
    model.__class__ = other
    assert not gate(model, weights, Arrival(lease.manifest.segments))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "OtherForCausalLM" not in KNOWN
