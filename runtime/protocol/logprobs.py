"""Owns the shape that log-probabilities have in OpenAI's answers, one for chats and one for completions. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.engine.base import Codec, TokenEvent

_LEAST = -9999.0  # JSON has no infinities; OpenAI's answers have this in their place


def logprobs(codec: Codec, events: Iterable[TokenEvent], *, chat: bool, offset: int = 0) -> dict[str, object] | None:
    """Return the `logprobs` of a choice or chunk made of `events`; None if they have none.

    `offset` is the number of characters of the choice before `events`.
    """
    events = list(events)
    if all(event.logprobs is None for event in events):
        return None
    return _chat(codec, events) if chat else _completion(codec, events, offset)


def _chat(codec: Codec, events: Iterable[TokenEvent]) -> dict[str, object]:
    content = [
        _token(codec, event.token, event.logprobs.token)
        | {"top_logprobs": [_token(codec, token, value) for token, value in event.logprobs.top]}
        for event in events
        if event.logprobs is not None and event.token is not None
    ]
    return {"content": content, "refusal": None}


def _token(codec: Codec, token: int, value: float) -> dict[str, object]:
    text = codec.decode([token])
    # A token that is part of a character has no text, and tokenizers do not tell its bytes.
    whole = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(_LEAST, value), "bytes": whole}


def _completion(codec: Codec, events: Iterable[TokenEvent], offset: int) -> dict[str, object]:
    tokens: list[str] = []
    values: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for event in events:
        if event.logprobs is not None and event.token is not None:
            tokens.append(codec.decode([event.token]))
            values.append(max(_LEAST, event.logprobs.token))
            top: dict[str, float] = {}
            for token, value in event.logprobs.top:  # of ids with the same text the likeliest counts
                top.setdefault(codec.decode([token]), max(_LEAST, value))
            tops.append(top)
            offsets.append(offset)
        offset += len(event.text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
