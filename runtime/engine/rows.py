"""Owns the memory of generations: keys and values of every token that the model has seen, one buffer each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FIRST = 64  # tokens that a buffer begins with


@dataclass(frozen=True, slots=True)
class Shape:
    """The keys and values of one token: in each of `layers`, `heads` of them of `key` and `value` numbers each."""

    layers: int
    heads: int
    key: int
    value: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        return self.layers * self.heads * (self.key + self.value) * self.dtype.itemsize


class Rows:
    """Keys and values of one generation's tokens, each key beside its value: [layers, capacity, heads, key + value].

    The first `fed` tokens are there. The rows of the first `exact` tokens depend on nothing but the tokens themselves,
    to the last bit: these tokens were fed in pieces cut at fixed places, each piece in a forward pass of its own.
    """

    __slots__ = ("exact", "fed", "kv", "limit", "shape")

    def __init__(self, shape: Shape, limit: int) -> None:
        """`limit` is the number of tokens that the generation will never exceed."""
        self.shape, self.limit = shape, limit
        self.fed = self.exact = 0
        self.kv = _buffer(shape, min(limit, _FIRST))

    @property
    def nbytes(self) -> int:
        return self.kv.shape[1] * self.shape.token_bytes

    def make_room(self, tokens: int) -> None:
        """Make room for `tokens` in all. Capacities double, so that every token is copied about once in its life."""
        capacity = self.kv.shape[1]
        if tokens > capacity:
            self._resize(min(self.limit, max(tokens, 2 * capacity)))

    def shrink(self) -> None:
        """Give back the room that no token has taken, where that is worth a copy."""
        if self.kv.shape[1] > 1.25 * self.fed:
            self._resize(self.fed)
        self.limit = self.kv.shape[1]

    def take(self, other: Rows, tokens: int) -> None:
        """Begin with a copy of the first `tokens` of `other`."""
        self.make_room(tokens)
        self.kv[:, :tokens] = other.kv[:, :tokens]
        self.fed, self.exact = tokens, min(tokens, other.exact)

    def _resize(self, capacity: int) -> None:
        kv = _buffer(self.shape, capacity)
        kv[:, : self.fed] = self.kv[:, : self.fed]
        self.kv = kv


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` as `KVRow` has it: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _buffer(shape: Shape, capacity: int) -> torch.Tensor:
    size = (shape.layers, capacity, shape.heads, shape.key + shape.value)
    return torch.empty(size, dtype=shape.dtype, device=shape.device)
