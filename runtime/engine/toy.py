"""Owns the toy: an engine without torch or weights that keeps the whole contract and generates readable text.

The toy answers with the words of its prompt. A conversation gets the last message back, then an end-of-sequence token;
a plain prompt is repeated until `max_tokens`. With a temperature above 0 the words come in an order drawn from (seed,
number of the word); the other sampling parameters change nothing. Function developers run their `handler_test.py` on
the toy, and our tests run everything above the engine on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import count, islice

from runtime.engine.base import SamplingParams, TokenEvent
from runtime.engine.bounds import Bounds
from runtime.engine.generation import Generation
from runtime.engine.loop import Loop, Row
from runtime.errors import BadRequest

BOS, EOS, TURN, ANSWER = range(256, 260)
_DIMENSIONS = 32


class ToyCodec:
    """Bytes are the ids 0..255; 256..259 begin a text, end one, begin a message and begin the answer."""

    eos_ids: frozenset[int] = frozenset({EOS})
    vocabulary = 260

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None = None) -> list[int]:
        """<BOS> (<TURN> role ":" content)* <ANSWER>."""
        if tools:
            raise BadRequest("the toy model cannot use tools; leave them out", "tools")
        ids = [BOS]
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or not isinstance(content, str):
                raise BadRequest("each message needs a role and a content, both strings", "messages")
            ids += [TURN, *f"{role}:{content}".encode()]
        return [*ids, ANSWER]


class ToyEngine(Loop[Iterator[int]]):
    """The contract without a model. Each step takes `step_delay` seconds and gives every generation one token."""

    kind = "toy"

    def __init__(
        self,
        codec: ToyCodec | None = None,
        *,
        revision: str = "toy",
        context_length: int = 4096,
        slots: int = 4,
        queue_size: int = 16,
        step_delay: float = 0.0,
    ) -> None:
        super().__init__(
            codec or ToyCodec(),
            revision=revision,
            bounds=Bounds(context_length, ToyCodec.vocabulary),
            slots=slots,
            queue_size=queue_size,
        )
        self.step_delay = step_delay
        self.start()

    def step(self, rows: Sequence[Row[Iterator[int]]]) -> Iterable[tuple[Row[Iterator[int]], TokenEvent]]:
        if self.step_delay:
            time.sleep(self.step_delay)
        for row in rows:
            if row.memory is None:
                row.memory = _continue(row.generation)
            yield row, row.generation.advance(next(row.memory))

    def embed_one(self, prompt: Sequence[int]) -> list[float]:
        """Return a vector of 32 dimensions: the sum of a pseudo-random vector per word, so like texts are alike."""
        words = bytes(token for token in prompt if token < 256).split() or [b""]
        hashes = [blake2b(word.lower(), digest_size=_DIMENSIONS).digest() for word in words]
        vector = [sum(column) - 127.5 * len(hashes) for column in zip(*hashes, strict=True)]
        length = math.sqrt(sum(x * x for x in vector))
        return [x / length for x in vector]


def _continue(generation: Generation) -> Iterator[int]:
    """Yield the ids that follow those generated; they depend on the request alone, so any replica finds the same."""
    ids = _answer(generation.request.prompt, generation.request.sampling)
    return islice(ids, len(generation.generated), None)


def _answer(prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
    chat = prompt[-1] == ANSWER
    last = len(prompt) - prompt[::-1].index(TURN) if chat and TURN in prompt else 0
    text = bytes(token for token in prompt[last:] if token < 256)
    words = (text.partition(b":")[2] if last else text).split() or [b"..."]
    for number in count():
        word = words[number % len(words)]
        if sampling.temperature > 0:
            drawn = blake2b(b"%d %d" % (sampling.seed, number), digest_size=8).digest()
            word = words[int.from_bytes(drawn) % len(words)]
        yield from word if chat and number == 0 else b" " + word
        if chat and number % len(words) == len(words) - 1:
            yield EOS
