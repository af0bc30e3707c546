"""Owns the bounds of an engine: which requests it can serve at all, and what one costs in memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.engine.base import GenerationRequest
from runtime.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Bounds:
    """At most `context_length` tokens of prompt and answer together, with ids below `vocabulary`.

    `memory` bytes hold what generations remember, `token_bytes` of each of their tokens; None: no bound.
    """

    context_length: int
    vocabulary: int
    memory: int | None = None
    token_bytes: int = 0

    def cost(self, request: GenerationRequest) -> int:
        """Return the bytes that the whole of a generation may come to remember."""
        return (len(request.prompt) + request.max_tokens) * self.token_bytes

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raise `BadRequest` for ids that the model cannot take in; `param` is the caller's name of them."""
        if not 0 < len(ids) <= self.context_length:
            raise BadRequest(f"the {param} has {len(ids)} tokens; it must have 1..{self.context_length}", param)
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise BadRequest(f"the {param} has token ids outside of 0..{self.vocabulary - 1}", param)

    def check(self, request: GenerationRequest) -> None:
        """Raise `BadRequest` for a request that could not be served even by an engine without other work."""
        length = len(request.prompt)
        self.check_ids(request.prompt, "prompt")
        if request.max_tokens < 1:
            raise BadRequest(f"max_tokens is {request.max_tokens}; ask for at least 1", "max_tokens")
        if length + request.max_tokens > self.context_length:
            raise BadRequest(
                f"the prompt has {length} tokens and max_tokens is {request.max_tokens}, together more than the "
                f"model's context of {self.context_length} tokens; shorten one of them",
                "max_tokens" if length < self.context_length else "prompt",
            )
        if self.memory is not None and self.cost(request) > self.memory:
            tokens, room = length + request.max_tokens, self.memory // self.token_bytes
            raise BadRequest(
                f"prompt and max_tokens come to {tokens} tokens, and the memory here holds those of {room}; "
                "ask for fewer tokens, or raise the memory limit or GLOWPLUG_KV_MEMORY",
                "max_tokens",
            )
        if any(not 0 <= token < self.vocabulary for token in request.sampling.logit_bias):
            raise BadRequest(f"logit_bias names token ids outside of 0..{self.vocabulary - 1}", "logit_bias")
