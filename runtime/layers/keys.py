"""The tree of layers, and the choice of a layer that a process may be forked from. Pure.

    bare    the interpreter and the runtime's own modules
     └─ lang    torch, transformers, the code of the preloaded kinds of models
         └─ model   one model put together on its weights, and its tokenizer
             └─ user    the handler imported, serving: a worker, which no other process is forked from

The `Needs` that a layer meets are compared field by field with those of a process: everything that decides what
imported code does must be equal, because a forked child has it for good. A key is a digest for each level down to the
layer's, so that a layer fits exactly if its key is the beginning of the process's key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

Level = Literal["bare", "lang", "model", "user"]
LEVELS: tuple[Level, ...] = ("bare", "lang", "model", "user")

_AT: Mapping[Level, tuple[str, ...]] = {
    "bare": ("machine", "python", "base", "environment", "uid", "domain"),
    "lang": ("preload",),
    "model": ("model", "private"),
    "user": ("handler",),
}
# Variables that are read once, by Python code while it is imported, or by a library when it is loaded.
_RELEVANT = (
    "PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH", "ATEN_",
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "CUDA_", "NVIDIA_", "NCCL_", "LANG", "LC_",
    "TZ", "GLOWPLUG_LEAN_IMPORTS",
)  # fmt: skip
_THREADS = "_NUM_THREADS"  # a layer always has one thread; its children have as many as they may use


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The needs of a process. `base` is a checksum of the locked base set, `model` identifies the model's bytes."""

    machine: str
    python: str
    base: str
    environment: tuple[tuple[str, str], ...] = ()
    uid: int = 0
    domain: str = ""  # of trust: functions of different ones share no process
    preload: tuple[str, ...] = ()
    model: str = ""
    private: bool = False  # whether the weights are a copy of its own
    handler: str = ""


class Found(NamedTuple):
    """The deepest layer that fits, None if none does, and why there is no deeper one ("" for the deepest of all)."""

    layer: str | None
    level: Level
    why: str


def relevant(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the variables that decide what imported code does, in order."""
    return tuple(
        sorted(
            (name, value)
            for name, value in environment.items()
            if name.startswith(_RELEVANT) and not name.endswith(_THREADS)
        )
    )


def key(level: Level, needs: Needs) -> str:
    """Return digests, one for each level down to `level`, joined by dots: a layer's key begins with its parent's."""
    import hashlib  # a shim that asks for a worker only compares, and should not wait for this import

    texts = ["\n".join(f"{name}={value!r}" for name, value in part) for part in _parts(level, needs)]
    return ".".join(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def _parts(level: Level, needs: Needs) -> list[list[tuple[str, object]]]:
    """Return names and values of the needs, level by level."""
    return [[(name, getattr(needs, name)) for name in _AT[each]] for each in LEVELS[: LEVELS.index(level) + 1]]


def deepest(wanted: Needs, there: Iterable[tuple[str, Level, Needs]]) -> Found:
    """Return the deepest of the layers (name, level, needs) that `wanted` may be forked from, and why no deeper one.

    A layer fits if its key is the beginning of the wanted key. Nothing deeper than `model` is ever shared.
    """
    layers = list(there)
    reasons: list[str] = []
    for level in ("model", "lang", "bare"):
        candidates = [(name, needs) for name, at, needs in layers if at == level]
        for name, needs in candidates:
            if _parts(level, wanted) == _parts(level, needs):
                return Found(name, level, "; ".join(reasons))
        reasons.append(
            f"{level}: {'; '.join(_difference(level, wanted, needs) for _, needs in candidates)}"
            if candidates
            else f"no {level} layer is there"
        )
    return Found(None, "bare", "; ".join(reasons))


def _difference(level: Level, wanted: Needs, there: Needs) -> str:
    """Return in words the first need that differs."""
    compared = {name for each in LEVELS[: LEVELS.index(level) + 1] for name in _AT[each]}
    for field in fields(Needs):
        mine, theirs = getattr(wanted, field.name), getattr(there, field.name)
        if field.name in compared and mine != theirs:
            if field.name == "environment":
                names = sorted({name for name, _ in set(mine) ^ set(theirs)})
                return f"another environment ({', '.join(names)})"
            return f"another {_NAMES.get(field.name, field.name)} ({theirs or 'none'}, not {mine or 'none'})"
    raise AssertionError("two equal needs have equal keys")


_NAMES = {
    "base": "base set",
    "uid": "user",
    "domain": "trust domain",
    "preload": "list of models",
    "private": "weights",
}
