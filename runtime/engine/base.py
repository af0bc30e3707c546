"""The engine contract: what every engine does, and the values that cross it.

    submit(request) ──► TokenStream ──► TokenEvent … TokenEvent(finish=…)
    cancel(id)            the stream ends with finish="cancelled"
    export(id)            pauses the generation between two steps, returns its GenerationState
      ├─ resume(id)       the hand-off failed: it goes on here
      └─ forget(id)       it lives elsewhere now: the stream ends with finish="moved"
    admit(state)          continues an exported generation; its stream begins at the next token

Every verb may be called from any thread. Of these only `export` waits for a forward pass, the step in progress;
`embed` and `close` wait, too. A state of one engine is accepted by every engine of the same kind on the same revision,
in any process.
Token `index` counts generated tokens from 0; readers check by it, across replicas, that no token is lost or doubled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Finish = Literal["stop", "length", "cancelled", "moved", "error"]

STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters by which the next token is drawn from the model's scores.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch their filter off. The noise of a token is a
    function of (`seed`, position of the token) alone, so the same request gives the same text in any process and beside
    any other requests; the maker of the request draws the seed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue: token ids, at most `max_tokens` new ones, until a stop string or a stop id.

    `stop_ids` end the generation and are not part of its text; the model's own end-of-sequence ids are among them
    unless the caller wants to go on past them. `logprobs` asks for the log-probability of each token and of that many
    likeliest others (0: of the token alone). `deterministic` asks for the same tokens, to the last bit of the model's
    arithmetic, whatever else is running.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities, before temperature, penalties and filters.

    `top` holds the likeliest tokens, the likeliest first, whether or not the drawn one is among them.
    """

    token: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token and the text that became final with it (often "", never taken back).

    The last event of a stream has `finish`; its `token` is None where no token belongs to it.
    """

    index: int
    token: int | None
    text: str = ""
    finish: Finish | None = None
    error: str | None = None
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class KVRow:
    """One tensor of a generation's cache: raw little-endian bytes of `dtype` (torch's name) and `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class GenerationState:
    """The state of a generation, complete enough to continue it in another process.

    `generated` are the new ids so far, `emitted` counts the characters of text already handed out; the stop
    matcher's state follows from both. `kv` is empty where the receiver recomputes keys and values. The receiver's
    engine has to be of the kind `engine`, on `revision`. For a deterministic request it also needs the same
    `arithmetic`, which is all that the bits of its results depend on besides (batch rows, threads, processor, …); ""
    for other requests.
    """

    version: int
    engine: str
    revision: str
    request: GenerationRequest
    generated: tuple[int, ...]
    emitted: int
    kv: tuple[KVRow, ...] = ()
    arithmetic: str = ""


class Codec(Protocol):
    """A tokenizer: text to ids and back. `TokenizerCodec` wraps one of transformers, `ToyCodec` needs none."""

    eos_ids: frozenset[int]
    vocabulary: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; an incomplete UTF-8 sequence at the end shows as U+FFFD."""
        ...

    def chat(self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None = None) -> list[int]:
        """Return a conversation's ids by the model's chat template, ready for the answer. Raise `BadRequest`."""
        ...


class TokenStream(Protocol):
    """The events of one generation, for one reader. To leave the stream early (`close`, the end of `with`) cancels."""

    request_id: str

    def __iter__(self) -> Iterator[TokenEvent]: ...

    def next(self, timeout: float) -> TokenEvent | None:
        """Return the next event, or None if none came within `timeout` seconds. Raise StopIteration after the last."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine's work and memory at one moment.

    `memory` of `memory_limit` bytes are promised to generations; finished generations have left `cached` bytes behind,
    which have spared the computing of `reused` prompt tokens.
    """

    running: int
    waiting: int
    slots: int
    queue: int
    memory: int = 0
    memory_limit: int = 0
    cached: int = 0
    reused: int = 0


class Engine(Protocol):
    """The verbs of the module's diagram. Engines of one `kind` can read each other's states."""

    kind: str
    revision: str
    context_length: int

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Begin a generation. Raise `EngineBusy` when slots and queue are full or the id is live, `BadRequest` for a
        prompt that cannot be served."""
        ...

    def cancel(self, request_id: str) -> None: ...

    def export(self, request_id: str, *, kv: bool = True) -> GenerationState:
        """Pause a generation and return its state. Raise `KeyError` for an id that is not live here."""
        ...

    def resume(self, request_id: str) -> None: ...

    def forget(self, request_id: str) -> None: ...

    def admit(self, state: GenerationState) -> TokenStream:
        """Go on with an exported generation. Raise `SnapshotRefused` with the reason, `EngineBusy` when there is no
        slot or the id is live."""
        ...

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return one vector of length 1 per prompt, made between the steps of generations: [prompts][hidden size].

        Models give the mean of their last hidden states over the prompt's tokens. Raise `BadRequest`, `EngineFailed`.
        """
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """End every live stream with finish="error"; return once the engine's thread is gone."""
        ...
