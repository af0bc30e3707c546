"""Owns the mapping of leased weights: lease → read-only maps → tensors → transformers model. The only place that maps.

The model is built on the meta device, so that no memory is allocated for its weights, and the views are assigned. A
checkpoint that needs more (renamed keys, quantisation, missing tensors, another dtype) goes to `from_pretrained`, with
the same views as a state dict, and the ledger says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from cache_agent.model.manifest import Manifest, Tensor, model_config
from runtime.engine.skeleton import skeleton
from runtime.errors import ModelUnusable
from runtime.resume.snapshot import tokenizer_digest
from runtime.worker.guard import WriteGuard

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22
_STRIDE = 16 << 20  # bytes of one `madvise`, for which other changes of this process's mappings have to wait


class SegmentSource(Protocol):
    """A lease, or another holder of a model's bytes: a manifest and the fds of its segments."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def segments(self) -> Sequence[int]: ...


class Weights:
    """Read-only tensors over the segments of a lease, valid for as long as this object lives, agent or not."""

    def __init__(self, lease: SegmentSource) -> None:
        """Map the segments of `lease`. The lease has to stay; its fds may be closed."""
        self.manifest = lease.manifest
        self._maps = [
            mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            for fd, size in zip(lease.segments, lease.manifest.segments, strict=True)
        ]
        with warnings.catch_warnings():
            # torch warns because the maps are read-only; `WriteGuard` and the page protection stop all writes.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._ranges = [_address(mapping) for mapping in self._maps]
            self.guard = WriteGuard(self._ranges)
            self.tensors = {tensor.name: self._view(tensor) for tensor in self.manifest.tensors}

    def populate(self) -> Iterator[None]:
        """Enter the pages of all bytes into this process's tables, one piece per step, before a forward pass does.

        A forked process begins without them, and its first forward pass would enter them one by one. For any thread.
        """
        for start, end in self._ranges:
            for place in range(start, end, _STRIDE):
                size = ctypes.c_size_t(min(_STRIDE, end - place))
                if _LIBC.madvise(ctypes.c_void_p(place), size, _MADV_POPULATE_READ):
                    return  # a kernel before 5.14
                yield

    def close(self) -> None:
        """Unmap every segment that no tensor uses any more."""
        self.tensors.clear()
        for mapping in self._maps:
            with contextlib.suppress(BufferError):
                mapping.close()

    def _view(self, tensor: Tensor) -> torch.Tensor:
        dtype = _DTYPES[tensor.dtype]
        if tensor.size == 0:
            return torch.empty(tensor.shape, dtype=dtype)
        flat = torch.frombuffer(
            self._maps[tensor.segment], dtype=dtype, count=tensor.size // dtype.itemsize, offset=tensor.offset
        )
        return flat.view(tensor.shape)


def preload(manifest: Manifest) -> None:
    """Import the modules that `assemble` will need for this model."""
    kind = model_config(manifest.files).get("model_type")
    if isinstance(kind, str):
        preload_kind(kind)


def preload_kind(kind: str) -> None:
    """Import the code of models of this `model_type`, if transformers knows it."""
    if kind in CONFIG_MAPPING:
        config = CONFIG_MAPPING[kind]
        for mapping in (AutoModelForCausalLM._model_mapping, TOKENIZER_MAPPING):
            if config in mapping:
                _ = mapping[config]


@dataclass(frozen=True, slots=True)
class AssembledModel:
    """A transformers model on shared weights, and its tokenizer and configuration.

    `how` is "assigned" or "from_pretrained": the way in which the model was assembled.
    """

    model: Any
    tokenizer: Any
    tokenizer_digest: str
    generation_config: dict[str, Any]
    how: str

    @property
    def eos(self) -> list[int]:
        """The end-of-sequence ids in generation_config.json, which are in addition to the tokenizer's."""
        eos = self.generation_config.get("eos_token_id")
        return [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]


def assemble(weights: Weights, *, private: bool = False, whole: Callable[[], None] = lambda: None) -> AssembledModel:
    """Build the model and its tokenizer. With `private` every weight is copied to private memory of this process.

    The bytes may still be arriving: building needs only names and shapes. If it has to read bytes all the same, `whole`
    is called before, which returns when they are there. Raises `ModelUnusable` with transformers' message.
    """
    with _small_files(weights.manifest) as directory:
        model, how = _model(weights, directory, private, whole)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    files = weights.manifest.files
    generation_config = json.loads(files.get("generation_config.json", b"{}"))
    return AssembledModel(model, tokenizer, tokenizer_digest(files), generation_config, how)


def assemble_model(weights: Weights, *, whole: Callable[[], None] = lambda: None) -> Any:
    """Build the model without its tokenizer. `whole` is as for `assemble`. Raise `ModelUnusable`."""
    with _small_files(weights.manifest) as directory:
        return _model(weights, directory, private=False, whole=whole)[0]


@contextmanager
def _small_files(manifest: Manifest) -> Iterator[Path]:
    """Provide a directory with the checkpoint's small files, for transformers to read."""
    directory = Path(tempfile.mkdtemp(prefix="glowplug-model-"))
    try:
        for name, data in manifest.files.items():
            (directory / name).write_bytes(data)
        yield directory
    except ModelUnusable:
        raise
    except Exception as error:
        raise ModelUnusable(
            f"transformers cannot make a model of this checkpoint ({type(error).__name__}: {error}); it must be a "
            "causal language model that from_pretrained loads without remote code"
        ) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _model(weights: Weights, directory: Path, private: bool, whole: Callable[[], None]) -> tuple[Any, str]:
    config = AutoConfig.from_pretrained(directory)
    tensors = weights.tensors
    if private:
        whole()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model, how = _build(config, tensors, whole)
    if "generation_config.json" in weights.manifest.files:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, how


def _build(config: Any, tensors: Mapping[str, torch.Tensor], whole: Callable[[], None]) -> tuple[Any, str]:
    if getattr(config, "auto_map", None) and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelUnusable("the checkpoint needs code of its own (auto_map); running it is not supported")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelUnusable(f"{config.model_type} is no causal language model that this transformers version knows")
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model = None if getattr(config, "quantization_config", None) else _assign(kind, config, tensors)
    if model is not None:
        return model, "assigned"
    whole()
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype="auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
    )
    if info["mismatched_keys"]:
        name, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelUnusable(
            f"{name} is {list(stored)} in the checkpoint, and its config.json says {list(wanted)}: they do not belong "
            "together"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelUnusable(f"the checkpoint lacks {len(missing)} tensors of {config.model_type}, such as {missing[0]}")
    return model, "from_pretrained"


def _assign(kind: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any | None:
    """Return the model with the views as its parameters; None if checkpoint and model do not match name by name."""
    dtype = config.dtype or next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    model = skeleton(kind, config, dtype=dtype)
    state = model.state_dict(keep_vars=True)
    missing = {name for name in state if name not in tensors}
    if (
        missing - model.all_tied_weights_keys.keys()
        or tensors.keys() - state.keys()
        or any(state[name].dtype != t.dtype or state[name].shape != t.shape for name, t in tensors.items())
    ):
        return None
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for module in model.modules():
        # Buffers that no checkpoint holds (rotary frequencies) are computed by transformers' own initialisation,
        # which is safe here because such modules have no parameters that it could touch.
        absent = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if absent:
            if module._parameters:
                return None
            for name in absent:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return None
    return model.eval()


def _address(mapping: mmap.mmap) -> tuple[int, int]:
    """Return (first address, one past the last); torch finds them, for ctypes cannot for a read-only mapping."""
    start = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    return start, start + len(mapping)
