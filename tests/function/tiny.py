"""Tiny seeded models of every architecture, and the requests that engine tests make of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from runtime.engine.base import Engine, GenerationRequest, SamplingParams, TokenEvent

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # on tensors this small, two threads only wait for each other

VOCABULARY = 257  # bytes in the order of ByteLevel's alphabet after id 0, the end of sequence
ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt2")
PROMPT = tuple(b"a glow plug warms it")
GREEDY = SamplingParams(0.0)
SAMPLED = SamplingParams(1.0, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=11)


def tiny(architecture: str, dtype: str = "float32") -> Any:
    """A seeded model of a few ten thousand parameters whose scores are far enough apart to be worth comparing."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    if architecture != "gpt2":
        shape |= {"intermediate_size": 64, "num_key_value_heads": 2}
    if architecture == "mistral":
        shape |= {"sliding_window": 16}
    config = transformers.AutoConfig.for_model(architecture, **shape)
    return transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"</s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def greedy_reference(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())


def ask(request_id: str = "a", count: int = 24, **more: Any) -> GenerationRequest:
    return replace(GenerationRequest(request_id, PROMPT, count, GREEDY), **more)


def run(engine: Engine, request: GenerationRequest) -> list[TokenEvent]:
    return list(engine.submit(request))


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
