"""Owns the interface of a loaded model, for handlers (as `context.model`) and for the OpenAI routes.

    text = context.model.generate("Once upon a time", max_tokens=50)
    for piece in context.model.generate(messages=[{"role": "user", "content": "Hi"}], stream=True): ...
    vectors = context.model.embed(["first text", "second text"])

Nothing here needs torch, transformers or numpy; the engine and the codec bring what they need.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from runtime.engine.base import Codec, Engine, Finish, GenerationRequest, SamplingParams, TokenStream
from runtime.errors import BadRequest, EngineFailed, Moved, Unsupported
from runtime.protocol.parameters import Parameters, Params, check, integer
from runtime.resume.snapshot import ReplicaIdentity

if TYPE_CHECKING:
    from runtime.resume.sessions import Sessions

DEFAULT_MAX_TOKENS = 1024

_GREEDY_BELOW = 1e-5  # temperatures under it would only divide scores into infinities
_IDLE_WAIT = 30.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: an end-of-sequence token counts among the generated ones."""

    prompt_tokens: int
    completion_tokens: int


class TextStream:
    """The text of one generation, piece by piece. To leave the stream early (`close`, end of `with`) cancels.

    `finish_reason` is None until the end, then "stop", "length" or "cancelled"; `usage` counts up to the last piece.
    Raises `EngineFailed` in place of the rest if the engine breaks.
    """

    def __init__(self, tokens: TokenStream, request: GenerationRequest, *, sent: int = 0, session_id: str = "") -> None:
        """`sent` tokens of the answer came before `tokens`; `session_id` names the answer's session, "" for none."""
        self.request_id = tokens.request_id
        self.request = request
        self.tokens = tokens
        self.finish_reason: Finish | None = None
        self._generated = sent
        self._session_id = session_id

    def in_session(self, session_id: str, tokens: TokenStream) -> None:
        """Go on with `tokens`, which are the same ones and recorded in that session."""
        self._session_id, self.tokens = session_id, tokens

    @property
    def position(self) -> str | None:
        """The id of an event that ends with the last piece; None for an answer without a session."""
        return f"{self._session_id}:{self._generated}" if self._session_id else None

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
        """Return all of the text that is left, once it is complete."""
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
    `raw_read` says whether the handler has read `raw`. `sessions` record requests, if this function keeps them.
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
        self.sessions: Sessions | None = None
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
        self.raw_read = False

    @property
    def identity(self) -> ReplicaIdentity:
        """The identity of a worker with this model, by which others know whether they can go on with its requests."""
        arithmetic = getattr(self.engine, "arithmetic", "")
        return ReplicaIdentity(self.engine.kind, self.revision, self.tokenizer_digest, "", arithmetic)

    def let_go(self) -> None:
        """Give the weights up, and `raw` with them; requests have to be served by an engine elsewhere."""
        raw, self._raw, self._let_go = self._raw, None, True
        if raw is not None:
            raw.to("meta")  # the layer that this worker was forked from has references to the model, too

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
        """Continue `prompt` (text or token ids) or answer `messages`; see `Params` for the rest.

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
        """Return the token ids of exactly one of `prompt` and `messages`. Raise `BadRequest`."""
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
        return [integer("prompt", token, 0, 2**31 - 1) for token in prompt or ()]

    def begin(self, request: GenerationRequest) -> TokenStream:
        """Start a generation. Raise `EngineBusy`, `EngineFailed`, `Moved`."""
        return self.engine.submit(request)

    def request(self, prompt: Sequence[int], parameters: Parameters, request_id: str) -> GenerationRequest:
        """Return a request for the engine, with this model's defaults. Raise `BadRequest`."""
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
        """Return one vector of length 1 per text (or list of token ids): the mean of its last hidden states.

        Raises `BadRequest` for a text that is empty or longer than the context.
        """
        if isinstance(texts, str):
            raise BadRequest("embed takes a list of texts, not one text", "input")
        return self.engine.embed([self.encode(text) for text in texts])
