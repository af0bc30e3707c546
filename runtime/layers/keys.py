"""The tree of layers, and from which of those that are there a process may be forked. Pure.

    bare    the interpreter and the runtime's own modules
     └─ lang    torch, transformers, the code of the preloaded kinds of models
         └─ model   one model put together on its weights, and its tokenizer
             └─ user    the handler imported, serving: a worker, which nobody else can share

What a layer was made of is compared field by field with what a process needs: everything that decides what imported
code does must be equal, because a forked child has it for good. A layer's key is a digest for each level down to its
own, so that a layer fits exactly if its key is the beginning of the other's.
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
# Read once, while something is imported, or by a library when it is loaded.
_RELEVANT = (
    "PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH", "ATEN_",
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "CUDA_", "NVIDIA_", "NCCL_", "LANG", "LC_",
    "TZ", "GLOWPLUG_LEAN_IMPORTS",
)  # fmt: skip
_THREADS = "_NUM_THREADS"  # a layer always has one thread; its children have as many as they may use


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a process is made of. `base` is the digest of the locked base set, `model` identifies the model's bytes."""

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
    """The deepest layer that fits, None if none does, and why it is not a deeper one ("" if it is the deepest)."""

    layer: str | None
    level: Level
    why: str


def relevant(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables that decide what imported code does, in order."""
    return tuple(
        sorted(
            (name, value)
            for name, value in environment.items()
            if name.startswith(_RELEVANT) and not name.endswith(_THREADS)
        )
    )


def key(level: Level, needs: Needs) -> str:
    """A digest for each level down to `level`, joined by dots: the key of a layer begins with that of its parent."""
    import hashlib  # comparing needs none, and a shim that asks for a worker should not wait for it

    texts = ["\n".join(f"{name}={value!r}" for name, value in part) for part in _parts(level, needs)]
    return ".".join(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def _parts(level: Level, needs: Needs) -> list[list[tuple[str, object]]]:
    """What a key is made of, level by level."""
    return [[(name, getattr(needs, name)) for name in _AT[each]] for each in LEVELS[: LEVELS.index(level) + 1]]


def deepest(wanted: Needs, there: Iterable[tuple[str, Level, Needs]]) -> Found:
    """The deepest of the layers (name, level, what it was made of) from which `wanted` may be forked; why no deeper.

    A layer fits if its key is the beginning of the wanted one's. Nothing deeper than `model` is ever shared.
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
    """The first thing by which they differ, in words."""
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
