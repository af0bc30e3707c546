"""Makes the toy model for tests: everything a handler can ask of a model, without weights and without torch."""

from __future__ import annotations

from runtime.engine.base import SamplingParams
from runtime.engine.toy import ToyCodec, ToyEngine
from runtime.function.model import Model


def toy_model(
    name: str = "toy",
    *,
    revision: str = "toy",
    context_length: int = 4096,
    slots: int = 4,
    queue_size: int = 16,
    step_delay: float = 0.0,
    temperature: float = 0.0,
) -> Model:
    """Return a `Model` on the toy engine, which repeats the words of its prompt, see `runtime.engine.toy`.

    `temperature` is the default of requests that set none; `step_delay` is the time per token, in seconds. The engine
    has a thread until `model.engine.close()` or the end of the process.
    """
    codec = ToyCodec()
    engine = ToyEngine(
        codec,
        revision=revision,
        context_length=context_length,
        slots=slots,
        queue_size=queue_size,
        step_delay=step_delay,
    )
    return Model(name, revision, codec, engine, defaults=SamplingParams(temperature=temperature))
