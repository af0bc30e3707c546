"""Owns the requests of OpenAI's protocol: fields, types, neutral values, and the job made of a request. Pure.

A field that is not in a Struct, or that asks for something that is not supported, is refused by name; never ignored.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec

from runtime.errors import BadRequest
from runtime.protocol.parameters import Parameters, check

MAX_CHOICES = 8
MAX_CHAT_LOGPROBS, MAX_COMPLETION_LOGPROBS = 20, 5  # OpenAI's limits
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chats get the model's default

Content = str | list[str | int | list[int]]
S = TypeVar("S", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that chats and completions have in common. Those typed Any are in `_NEUTRAL`, or have no effect."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    deterministic: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None


class ChatRequest(Common, forbid_unknown_fields=True, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(Common, forbid_unknown_fields=True, kw_only=True):
    prompt: Content
    logprobs: int | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    input: Content
    model: str | None = None
    encoding_format: str | None = None
    dimensions: Any = None
    user: Any = None


# Fields that are not supported, with those of their values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "dimensions": (),
}
_SAME_NAME = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "stop", "ignore_eos", "deterministic"),
)
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: prompts × n choices."""

    chat: bool
    prompts: Sequence[str | Sequence[int] | Sequence[Mapping[str, object]]]
    tools: Sequence[object] | None
    parameters: Parameters
    n: int
    stream: bool
    include_usage: bool

    def choice_parameters(self) -> list[Parameters]:
        """Return the parameters of each prompt's n choices: the first has the request's seed, others a derived one."""
        if self.n == 1:
            return [self.parameters]
        seed = self.parameters.sampling.get("seed", secrets.randbits(63))
        seeds = [seed, *(_derived(seed, number) for number in range(1, self.n))]
        return [replace(self.parameters, sampling={**self.parameters.sampling, "seed": seed}) for seed in seeds]


# Made at import, by one thread: two threads that make a type's first decoder at once crash msgspec 0.22.
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ChatRequest, CompletionRequest, EmbeddingRequest)
}


def decode(body: bytes, kind: type[S]) -> S:
    """Return the request in `body`. Raise `BadRequest` that names the field at fault."""
    try:
        wanted: S = _DECODERS[kind].decode(body)
    except msgspec.ValidationError as error:
        place = re.search(r"`\$\.(\w+)", str(error))
        field = re.search(r"(?:unknown|required) field `(.*?)`", str(error))
        at_fault = place or field
        raise BadRequest(f"the request is not valid: {error}", at_fault[1] if at_fault else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request is not valid JSON: {error}") from error
    for name, neutral in _NEUTRAL.items():
        value = getattr(wanted, name, None)
        if value is not None and not any(value == lawful and type(value) is type(lawful) for lawful in neutral):
            only = " or ".join(msgspec.json.encode(lawful).decode() for lawful in neutral)
            raise BadRequest(f"{name} is not supported{f' other than as {only}' if only else ''}; leave it out", name)
    return wanted


def chat_job(wanted: ChatRequest) -> Job:
    """Return the job that a chat asks for. Raise `BadRequest` that names the field at fault."""
    if not wanted.messages:
        raise BadRequest("messages is empty; send at least one", "messages")
    if None not in (wanted.max_tokens, wanted.max_completion_tokens):
        raise BadRequest("give either max_tokens or max_completion_tokens", "max_completion_tokens")
    messages = [_message(number, message) for number, message in enumerate(wanted.messages)]
    tools = None if wanted.tool_choice == "none" else wanted.tools or None
    limit = wanted.max_tokens if wanted.max_completion_tokens is None else wanted.max_completion_tokens
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise BadRequest("top_logprobs is only for requests with logprobs: true", "top_logprobs")
    top = _within("top_logprobs", wanted.top_logprobs or 0, MAX_CHAT_LOGPROBS)
    return _job(wanted, [messages], limit, tools, top if wanted.logprobs else None)


def completion_job(wanted: CompletionRequest) -> Job:
    """Return the job that a completion asks for. Raise `BadRequest` that names the field at fault."""
    limit = COMPLETION_MAX_TOKENS if wanted.max_tokens is None else wanted.max_tokens
    top = None if wanted.logprobs is None else _within("logprobs", wanted.logprobs, MAX_COMPLETION_LOGPROBS)
    return _job(wanted, several(wanted.prompt, "prompt"), limit, None, top)


def _within(name: str, value: int, most: int) -> int:
    if not 0 <= value <= most:
        raise BadRequest(f"{name} is {value}; it must be 0..{most}", name)
    return value


def several(given: Content, param: str) -> list[str | list[int]]:
    """Return the prompts (or texts) of a field that may have one or many, each text or token ids."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(item, int) for item in given):
        return [given]  # type: ignore[list-item]
    if not given or any(isinstance(item, int) for item in given):
        raise BadRequest(f"{param} must be a text, a list of texts, token ids, or a list of lists of token ids", param)
    return given  # type: ignore[return-value]


def _job(
    wanted: Common,
    prompts: Sequence[Any],
    max_tokens: int | None,
    tools: Sequence[object] | None,
    logprobs: int | None,
) -> Job:
    n, stream, options = wanted.n or 1, bool(wanted.stream), wanted.stream_options
    if wanted.n is not None and not 1 <= wanted.n <= MAX_CHOICES:
        raise BadRequest(f"n must be 1..{MAX_CHOICES}", "n")
    if options is not None and not stream:
        raise BadRequest("stream_options is only for requests with stream: true", "stream_options")
    if options is not None and options.include_obfuscation:
        raise BadRequest("include_obfuscation is not supported; leave it out", "stream_options")
    given = {name: getattr(wanted, name) for name in _SAME_NAME}
    parameters = check(given | {"max_tokens": max_tokens, "stop_ids": wanted.stop_token_ids})
    parameters = replace(parameters, logprobs=logprobs)
    include_usage = bool(options and options.include_usage)
    return Job(isinstance(wanted, ChatRequest), prompts, tools, parameters, n, stream, include_usage)


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message for a chat template: with a known role, and text in place of a list of text parts."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in _ROLES:
        raise BadRequest(f"messages[{number}].role must be one of {', '.join(_ROLES)}", "messages")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRequest(
                f"messages[{number}].content has parts that are no text; this model reads text", "messages"
            )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise BadRequest(f"messages[{number}].content must be text", "messages")
    return {**message, "role": role, "content": content}


def _derived(seed: int, number: int) -> int:
    digest = blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
