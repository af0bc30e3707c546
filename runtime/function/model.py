"""Owns the face of a loaded model: what handlers meet as `context.model` and what the OpenAI routes are made of.

    text = context.model.generate("Once upon a time", max_tokens=50)
    for piece in context.model.generate(messages=[{"role": "user", "content": "Hi"}], stream=True): ...
    vectors = context.model.embed(["first text", "second text"])

Nothing here needs torch, transformers or numpy; the engine and the codec bring what they need.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from runtime.engine.base import Codec, Engine, Finish, GenerationRequest, SamplingParams, TokenStream
from runtime.errors import BadRequest, EngineFailed, Moved, Unsupported

if TYPE_CHECKING:
    from runtime.resume.checkpoint import Sessions

DEFAULT_MAX_TOKENS = 1024

_MAX_STOPS, _MAX_STOP_LENGTH, _MAX_BIASES = 16, 1000, 1024
_GREEDY_BELOW = 1e-5  # temperatures under it would only divide scores into infinities
_IDLE_WAIT = 30.0

# name: (least, most, is the least itself allowed)
_NUMBERS = {
    "temperature": (0.0, 2.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 10.0, False),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}
_INTEGERS = {"max_tokens": (1, 2**31 - 1), "top_k": (0, 2**31 - 1), "seed": (-(2**63), 2**63 - 1)}


class Params(TypedDict, total=False):
    """What may be asked of a generation besides its prompt; absent or None means the default.

    `max_tokens` (1024, or what the context leaves), `temperature` (0..2; 0: always the likeliest token), `top_k`
    (0: off), `top_p` (0..1), `min_p` (0..1), `repetition_penalty` (0..10), `presence_penalty` and `frequency_penalty`
    (-2..2), `logit_bias` (of token ids, -100..100), `seed` (drawn when absent; the same seed gives the same text),
    `stop` (a string or up to 16), `stop_ids` (token ids), `ignore_eos` (go on past the model's end of sequence),
    `deterministic` (the same tokens whatever else is running, in bf16, too).
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    ignore_eos: bool | None
    deterministic: bool | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """Checked `Params`: only what was given, the rest is the model's to decide."""

    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    deterministic: bool = False
    logprobs: int | None = None  # not among `Params`: it is for those who see token events, the OpenAI routes


def check(given: Mapping[str, object]) -> Parameters:
    """Checks what needs no model: names, types, ranges. Raises `BadRequest` that names the parameter."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in Params.__annotations__:
            raise BadRequest(f"unknown parameter {name!r}; known are {', '.join(Params.__annotations__)}", name)
    sampling: dict[str, Any] = {}
    for name, (least, most, closed) in _NUMBERS.items():
        if name in given:
            value = sampling[name] = _number(name, given[name])
            if not least <= value <= most or (value == least and not closed):
                above = "" if closed else "above "
                raise BadRequest(f"{name} is {value:g}; it must be {above}{least:g} to {most:g}", name)
    for name, (low, high) in _INTEGERS.items():
        if name in given:
            sampling[name] = _integer(name, given[name], low, high)
    if "logit_bias" in given:
        sampling["logit_bias"] = _biases(given["logit_bias"])
    for name in ("ignore_eos", "deterministic"):
        if not isinstance(given.get(name, False), bool):
            raise BadRequest(f"{name} must be true or false", name)
    ids = given.get("stop_ids", ())
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise BadRequest("stop_ids must be a list of token ids", "stop_ids")
    stop_ids = frozenset(_integer("stop_ids", token, 0, 2**31 - 1) for token in ids)
    flags = {name: bool(given.get(name, False)) for name in ("ignore_eos", "deterministic")}
    limit = sampling.pop("max_tokens", None)
    return Parameters(sampling, limit, _stops(given.get("stop", ())), stop_ids, **flags)


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What a checkpoint's generation_config.json wants, on top of OpenAI's defaults (temperature 1, no filter).

    Its sampling values are taken where they are given and lawful; an explicit `"do_sample": false` means greedy.
    """
    values: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        try:
            values |= check({name: generation_config.get(name)}).sampling
        except BadRequest:
            continue  # a checkpoint's odd taste is no reason not to serve it
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0.0
    return SamplingParams(**values)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: an end-of-sequence token counts among the generated ones."""

    prompt_tokens: int
    completion_tokens: int


class TextStream:
    """The text of one generation, piece by piece. Leaving it early (`close`, a `with` block's end) cancels it.

    `finish_reason` is None until the end, then "stop", "length" or "cancelled"; `usage` counts as it goes. Raises
    `EngineFailed` in place of the rest if the engine breaks.
    """

    def __init__(self, tokens: TokenStream, request: GenerationRequest, *, told: int = 0, kept_as: str = "") -> None:
        """`told` tokens of the answer came before these; `kept_as` names the request that they are kept as."""
        self.request_id = tokens.request_id
        self.request = request
        self.tokens = tokens
        self.finish_reason: Finish | None = None
        self._generated = told
        self._kept_as = kept_as

    def kept(self, kept_as: str, tokens: TokenStream) -> None:
        """Goes on with `tokens`, which are the same and kept as this request."""
        self._kept_as, self.tokens = kept_as, tokens

    @property
    def place(self) -> str | None:
        """The id of an event that ends here, where this request is kept."""
        return f"{self._kept_as}:{self._generated}" if self._kept_as else None

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), self._generated)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self.finish_reason is None:
            event = self.tokens.next(_IDLE_WAIT)
            if event is None:
                continue
            self._generated += event.token is not None
            self.finish_reason = event.finish
            if event.finish == "error":
                raise EngineFailed(event.error or "the engine failed")
            if event.finish == "moved":
                raise Moved(event.error or "this answer goes on at another replica; ask for it again")
            if event.text:
                return event.text
        raise StopIteration

    def text(self) -> str:
        """All of the text that is left, once it is complete."""
        return "".join(self)

    def close(self) -> None:
        self.tokens.close()
        self.finish_reason = self.finish_reason or "cancelled"

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Model:
    """A model ready to serve. May be used from any thread.

    `tokenizer` is the transformers tokenizer (on the toy, its codec); `defaults` are the sampling parameters of
    requests that do not set them; `raw_guard` is called whenever `raw` is read. `deterministic` makes every request so.
    """

    def __init__(
        self,
        name: str,
        revision: str,
        codec: Codec,
        engine: Engine,
        *,
        tokenizer: Any = None,
        raw: Any = None,
        raw_guard: Callable[[], None] | None = None,
        defaults: SamplingParams | None = None,
        deterministic: bool = False,
        tokenizer_digest: str = "",
    ) -> None:
        self.book: Sessions | None = None  # where requests are kept, if they are
        self.deterministic = deterministic
        self.tokenizer_digest = tokenizer_digest
        self.name = name
        self.revision = revision
        self.codec = codec
        self.engine = engine
        self.tokenizer: Any = codec if tokenizer is None else tokenizer
        self.defaults = defaults or SamplingParams()
        self._raw = raw
        self._raw_guard = raw_guard
        self._let_go = False
        self.raw_read = False  # code of the function's has the model itself

    def let_go(self) -> None:
        """The weights are given up, and `raw` with them; what is asked for is the engine's to have done elsewhere."""
        raw, self._raw, self._let_go = self._raw, None, True
        if raw is not None:
            raw.to("meta")  # so that whoever still has the model, a layer that we were forked from, has no weights

    @property
    def raw(self) -> Any:
        """The transformers model itself. Its weights are shared with other functions: read them, do not write."""
        if self._let_go:
            raise Moved("this replica has handed its work over and ends; send the request again, it finds another one")
        if self._raw is None:
            raise Unsupported(f"{self.name} is a toy without a transformers model; set GLOWPLUG_MODEL to a real one")
        self.raw_read = True
        if self._raw_guard is not None:
            self._raw_guard()
        return self._raw

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Sequence[Mapping[str, object]] | None = None,
        *,
        stream: Literal[False] = False,
        tools: Sequence[object] | None = None,
        request_id: str | None = None,
        **params: Unpack[Params],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Sequence[Mapping[str, object]] | None = None,
        *,
        stream: Literal[True],
        tools: Sequence[object] | None = None,
        request_id: str | None = None,
        **params: Unpack[Params],
    ) -> TextStream: ...

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Sequence[Mapping[str, object]] | None = None,
        *,
        stream: bool = False,
        tools: Sequence[object] | None = None,
        request_id: str | None = None,
        **params: Unpack[Params],
    ) -> str | TextStream:
        """Continues `prompt` (text or token ids) or answers `messages`; see `Params` for the rest.

        Returns the whole text, or with `stream=True` a `TextStream` of its pieces. Raises `BadRequest` (the parameter
        at fault in `param`), `EngineBusy`, `EngineFailed`.
        """
        ids = self.encode(prompt, messages, tools)
        request = self.request(ids, check(params), request_id or f"gen-{secrets.token_hex(12)}")
        text = TextStream(self.begin(request), request)
        return text if stream else text.text()

    def encode(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Sequence[Mapping[str, object]] | None = None,
        tools: Sequence[object] | None = None,
    ) -> list[int]:
        """Token ids of exactly one of `prompt` and `messages`. Raises `BadRequest`."""
        if (prompt is None) == (messages is None):
            raise BadRequest("give either a prompt or messages, and not both", "prompt")
        try:
            if messages is not None:
                return self.codec.chat(messages, tools)
            if isinstance(prompt, str):
                return self.codec.encode(prompt)
        except UnicodeEncodeError as error:
            raise BadRequest(
                f"the text is not valid Unicode: {error}", "messages" if prompt is None else "prompt"
            ) from error
        return [_integer("prompt", token, 0, 2**31 - 1) for token in prompt or ()]

    def begin(self, request: GenerationRequest) -> TokenStream:
        """Start a generation. Raises `EngineBusy`, `EngineFailed`, `Moved`."""
        return self.engine.submit(request)

    def request(self, prompt: Sequence[int], parameters: Parameters, request_id: str) -> GenerationRequest:
        """What the engine is asked for, this model's defaults filled in. Raises `BadRequest`."""
        left = self.engine.context_length - len(prompt)
        if left < 1:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens; the context of {self.name} is {self.engine.context_length} "
                "tokens, prompt and answer together; shorten the prompt",
                "prompt",
            )
        sampling = replace(self.defaults, **({"seed": secrets.randbits(63)} | dict(parameters.sampling)))
        if sampling.temperature < _GREEDY_BELOW:
            sampling = replace(sampling, temperature=0.0)
        return GenerationRequest(
            request_id,
            tuple(prompt),
            parameters.max_tokens or min(DEFAULT_MAX_TOKENS, left),
            sampling,
            parameters.stop,
            parameters.stop_ids | (frozenset() if parameters.ignore_eos else self.codec.eos_ids),
            parameters.logprobs,
            parameters.deterministic or self.deterministic,
        )

    def embed(self, texts: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """One vector of length 1 per text (or list of token ids): the mean of its last hidden states.

        Raises `BadRequest` for a text that is empty or longer than the context.
        """
        if isinstance(texts, str):
            raise BadRequest("embed takes a list of texts, not one text", "input")
        return self.engine.embed([self.encode(text) for text in texts])


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise BadRequest(f"{name} must be a number, not {type(value).__name__}", name)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _integer(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise BadRequest(f"{name} must be an integer, not {type(value).__name__}", name)
    number = int(value)
    if not low <= number <= high:
        raise BadRequest(f"{name} is out of range; it must be {low}..{high}", name)
    return number


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping) or len(value) > _MAX_BIASES:
        raise BadRequest(f"logit_bias must map at most {_MAX_BIASES} token ids to numbers", "logit_bias")
    biases = {_integer("logit_bias", token, 0, 2**31 - 1): _number("logit_bias", bias) for token, bias in value.items()}
    if not all(-100 <= bias <= 100 for bias in biases.values()):
        raise BadRequest("logit_bias has a value outside of -100..100", "logit_bias")
    return biases


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or len(stops) > _MAX_STOPS:
        raise BadRequest(f"stop must be a string or a list of at most {_MAX_STOPS} strings", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= _MAX_STOP_LENGTH:
            raise BadRequest(f"each stop must be a string of 1..{_MAX_STOP_LENGTH} characters", "stop")
    return tuple(stops)
