"""Checkpoints of seeded random weights in Hugging Face layout, of a size to measure and test with."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from tiny_model import tokenizer

Arch = Literal["llama", "qwen2", "mistral", "gpt2"]
Size = Literal["tiny", "125m", "1.1b"]
Dtype = Literal["bf16", "f32"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that make a size; `window` is Mistral's sliding window, short enough to matter."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    window: int


# 125m is the model of the measured cold starts, 1.1b has TinyLlama's numbers.
_LLAMA_LIKE: Mapping[Size, Shape] = {
    "tiny": Shape(512, 64, 128, 2, 4, 2, 256, 16),
    "125m": Shape(32000, 768, 2048, 12, 12, 4, 2048, 512),
    "1.1b": Shape(32000, 2048, 5632, 22, 32, 4, 2048, 1024),
}
# GPT-2 has no gated MLP and no grouped heads; its own vocabulary is larger, its context shorter.
_GPT2: Mapping[Size, Shape] = {
    "tiny": Shape(512, 64, 256, 2, 4, 4, 256, 0),
    "125m": Shape(50257, 768, 3072, 12, 12, 12, 1024, 0),
    "1.1b": Shape(50257, 1536, 6144, 36, 24, 24, 1024, 0),
}
_TIED_BY_DEFAULT: Mapping[Arch, bool] = {"llama": False, "qwen2": True, "mistral": False, "gpt2": True}
_TOKEN_IDS: Mapping[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}  # of tokenizer.SPECIAL_TOKENS
_TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "f32": torch.float32}
_FILE_DTYPES: Mapping[Dtype, str] = {"bf16": "BF16", "f32": "F32"}


def random_checkpoint(
    out: Path,
    *,
    arch: Arch,
    size: Size = "tiny",
    dtype: Dtype = "bf16",
    shards: int = 1,
    tied: bool | None = None,
    seed: int = 0,
    layers: int | None = None,
) -> None:
    """Write config, tokenizer and weights to the folder `out`, which is made if need be.

    The same arguments give the same bytes. `tied` None ties the head to the embedding as the architecture's own
    models do, `layers` overrides the size's number. Only one tensor is in memory at a time. Raises ValueError if
    there are fewer tensors than `shards`.
    """
    tied = _TIED_BY_DEFAULT[arch] if tied is None else tied
    config = _config(arch, size, tied, layers)
    config.dtype = _TORCH_DTYPES[dtype]
    config.architectures = [_skeleton(config).__class__.__name__]
    shapes = _tensor_shapes(config)
    plan = _split(shapes, shards)

    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.safetensors"), out / "model.safetensors.index.json"):
        stale.unlink(missing_ok=True)
    config.save_pretrained(out)
    GenerationConfig(**_TOKEN_IDS).save_pretrained(out)  # type: ignore[no-untyped-call]
    tokenizer.save(tokenizer.synthetic(config.vocab_size), out)

    if shards == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
        weight_map = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        width = _TORCH_DTYPES[dtype].itemsize
        total = sum(math.prod(shape) for shape in shapes.values()) * width
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    noise = torch.Generator().manual_seed(seed)
    for file, names in zip(files, plan, strict=True):
        _write(out / file, {name: shapes[name] for name in names}, dtype, arch, noise)


def _config(arch: Arch, size: Size, tied: bool, layers: int | None) -> PreTrainedConfig:
    shape = (_GPT2 if arch == "gpt2" else _LLAMA_LIKE)[size]
    if arch == "gpt2":
        return GPT2Config(
            vocab_size=shape.vocabulary,
            n_embd=shape.hidden,
            n_inner=shape.intermediate,
            n_layer=layers or shape.layers,
            n_head=shape.heads,
            n_positions=shape.context,
            tie_word_embeddings=tied,
            **_TOKEN_IDS,
        )
    settings: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": tied,
        **_TOKEN_IDS,
    }
    if arch == "mistral":
        return MistralConfig(sliding_window=shape.window, **settings)
    return (LlamaConfig if arch == "llama" else Qwen2Config)(**settings)


def _skeleton(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def _tensor_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Return the tensors that transformers stores for this config, in the order of its files: by name."""
    state = _skeleton(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: state[name].shape for name in sorted(state)}


def _split(shapes: Mapping[str, torch.Size], shards: int) -> list[list[str]]:
    """Cut the names, in order, into `shards` runs of about equal size, none of them empty."""
    if not 1 <= shards <= len(shapes):
        raise ValueError(f"{len(shapes)} tensors cannot be cut into {shards} shards")
    left = sum(math.prod(shape) for shape in shapes.values())
    plan: list[list[str]] = [[]]
    filled = 0
    names = list(shapes)
    for position, name in enumerate(names):
        open_shards = shards - len(plan) + 1
        enough = filled >= left / open_shards
        forced = len(names) - position == open_shards - 1
        if plan[-1] and open_shards > 1 and (enough or forced):
            plan.append([])
            left, filled = left - filled, 0
        plan[-1].append(name)
        filled += math.prod(shapes[name])
    return plan


def _write(file: Path, shapes: Mapping[str, torch.Size], dtype: Dtype, arch: Arch, noise: torch.Generator) -> None:
    """Write one safetensors file, a tensor at a time: `safetensors.torch.save_file` would hold the whole twice."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * _TORCH_DTYPES[dtype].itemsize
        header[name] = {"dtype": _FILE_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name, shape in shapes.items():
            tensor = _tensor(name, shape, arch, noise).to(_TORCH_DTYPES[dtype])
            stream.write(tensor.view(torch.uint8).numpy().data)


def _tensor(name: str, shape: Iterable[int], arch: Arch, noise: torch.Generator) -> Tensor:
    """Random values of the scale that keeps activations near 1, so that no layer drowns and every token matters."""
    values = torch.empty(*shape).uniform_(-1, 1, generator=noise)
    if values.dim() == 1:
        # Norms near one, biases near zero; none exactly, so that a lost one shows in the scores.
        return values.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
    # GPT-2 stores its layers input first, all others (and its embeddings) last.
    inputs = values.shape[0] if arch == "gpt2" and ".h." in name else values.shape[-1]
    return values.mul_(math.sqrt(3 / inputs))
