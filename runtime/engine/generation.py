"""Owns one generation: drawing the next token, deciding which text is final, stopping. Pure: no clock, no I/O.

    scores ──► sample ──► token ──► Detokeniser ──► StopMatcher ──► TokenEvent
                (seed, position)     whole UTF-8     held-back prefix of a stop string

Everything here follows from (request, generated ids), so a generation can be rebuilt anywhere from its state. Functions
import numpy when they use it: the worker's HTTP side imports this module before there is time for numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.engine.base import (
    STATE_VERSION,
    Codec,
    Finish,
    GenerationRequest,
    GenerationState,
    KVRow,
    Logprobs,
    SamplingParams,
    TokenEvent,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MASK64 = (1 << 64) - 1
_REPLACEMENT = "\ufffd"

# An incomplete UTF-8 sequence is at most three bytes, hence at most three tokens, from its end.
_MAX_INCOMPLETE = 3
# The detokeniser drops the older half of its window once the younger half has this many tokens.
_GROUP = 8
# A window of this length is cut in any case, so that text which never comes to a clean end stays cheap.
_WINDOW_LIMIT = 48


def gumbel(seed: int, position: int, size: int, ids: NDArray[np.intp] | None = None) -> NDArray[np.float64]:
    """Return Gumbel noise for a vocabulary of `size` ids at one position, or for `ids` among them: -log(-log u).

    u in (0, 1) is a function of (seed, position, id) alone. The words come from Philox-4x64 (Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", SC'11) with `seed` as key and `position` in the counter's second word, so that
    the blocks of neighbouring positions never overlap; each 32-bit half of a word makes one u. Raw words, because numpy
    promises only those to stay the same; in place, because fresh pages would cost more than the logarithms.
    """
    import numpy as np

    words = np.random.Philox(key=seed & _MASK64, counter=position << 64).random_raw((size + 1) // 2)
    halves = words.astype("<u8", copy=False).view("<u4")[:size]
    noise = (halves if ids is None else halves[ids]) + 0.5
    noise *= 2.0**-32
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def penalise(
    scores: NDArray[np.floating[Any]], params: SamplingParams, seen: Collection[int], counts: Mapping[int, int]
) -> NDArray[np.float64]:
    """Return a copy of `scores` [vocabulary] with penalties and bias applied.

    The repetition penalty (Keskar et al., CTRL, 2019) divides positive and multiplies negative scores of every id in
    `seen` (prompt and answer); presence and frequency penalties are OpenAI's, over the answer's `counts`; the bias
    comes last, so that +100 and -100 mean "always" and "never" whatever the penalties are.
    """
    import numpy as np

    result = scores.astype(np.float64)
    if params.repetition_penalty != 1.0 and seen:
        ids = np.fromiter(seen, np.intp, len(seen))
        values = result[ids]
        result[ids] = np.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and counts:
        ids = np.fromiter(counts.keys(), np.intp, len(counts))
        times = np.fromiter(counts.values(), np.float64, len(counts))
        result[ids] -= params.presence_penalty + params.frequency_penalty * times
    for token, bias in params.logit_bias.items():
        result[token] += bias
    return result


def survivors(scaled: NDArray[np.float64], params: SamplingParams) -> NDArray[np.intp] | None:
    """Return the ids that top-k, then top-p, then min-p leave of scores divided by the temperature; None for all.

    top-p is computed on the ids that top-k left, as in transformers and vLLM; ids that tie with the k-th stay.
    """
    import numpy as np

    size = len(scaled)
    ids: NDArray[np.intp] | None = None
    if 0 < params.top_k < size:
        ids = np.flatnonzero(scaled >= np.partition(scaled, size - params.top_k)[size - params.top_k])
    if params.top_p < 1.0:
        ids = np.arange(size) if ids is None else ids
        chances = np.exp(scaled[ids] - scaled[ids].max())
        chances /= chances.sum()
        # All ids below this chance together weigh less than 1 - top_p: none is needed, and the sort stays short.
        likely = chances >= min((1.0 - params.top_p) / len(ids), chances.max())
        ids, chances = ids[likely], chances[likely]
        order = np.argsort(-chances, kind="stable")
        enough = int(np.searchsorted(np.cumsum(chances[order]), params.top_p)) + 1
        ids = np.sort(ids[order[:enough]])
    if params.min_p > 0.0:
        ids = np.arange(size) if ids is None else ids
        ids = ids[scaled[ids] >= scaled[ids].max() + math.log(params.min_p)]
    return ids


def sample(
    scores: NDArray[np.floating[Any]],
    params: SamplingParams,
    position: int,
    seen: Collection[int] = (),
    counts: Mapping[int, int] | None = None,
) -> int:
    """Return the token for `position` (counted from the start of the prompt), drawn from `scores` [vocabulary].

    argmax(scores / temperature + Gumbel noise) draws from softmax(scores / temperature) exactly (the Gumbel-max
    trick; Gumbel 1954, Maddison et al. 2014). Raise `ArithmeticError` if the scores are not finite numbers.
    """
    best = scores.max()
    if not math.isfinite(best):
        raise ArithmeticError("the model's scores are not finite numbers")
    if _has_penalties(params):
        scores = penalise(scores, params, seen, counts or {})
    if params.temperature == 0.0:
        return int(scores.argmax())
    scaled = scores.astype("float64")
    scaled /= params.temperature
    ids = survivors(scaled, params)
    noise = gumbel(params.seed, position, len(scaled), ids)
    noise += scaled if ids is None else scaled[ids]
    best_at = int(noise.argmax())
    return best_at if ids is None else int(ids[best_at])


def logprobs(scores: NDArray[np.floating[Any]], token: int, top: int) -> Logprobs:
    """Return the log-probabilities of `token` and of the `top` likeliest tokens in softmax(`scores` [vocabulary])."""
    import numpy as np

    exact = scores.astype(np.float64)
    exact -= exact.max()
    exact -= math.log(np.exp(exact).sum())
    top = min(top, len(exact))
    ids = np.argpartition(exact, len(exact) - top)[len(exact) - top :] if top else np.empty(0, np.intp)
    ids = ids[np.lexsort((ids, -exact[ids]))]
    return Logprobs(float(exact[token]), tuple((int(i), float(exact[i])) for i in ids))


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty or params.logit_bias
    )


class Detokeniser:
    """Ids to text, piece by piece: never half a character, never taken back, each id decoded a bounded number of times.

    The text of an id depends on its neighbours (a leading space, bytes of one character spread over ids). So each new
    id is decoded together with a window of the ids before it, which begins inside `context`, the ids of the prompt; the
    characters beyond those already handed out are new. A U+FFFD at the end may be an incomplete character: it is held
    back for three ids, after which nothing can complete it any more.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, shown = _opening(decode, context)
        self._mark = len(self._window)  # where the younger half begins; the text is whole before it
        self._shown = len(shown)
        self._open = 0  # ids since the text was last whole
        self._text = ""

    def push(self, token: int) -> str:
        """Return the text that became final with `token`, often ""."""
        self._window.append(token)
        self._open += 1
        text = self._text = self._decode(self._window)
        final = len(text)
        if text.endswith(_REPLACEMENT):
            final = len(text.rstrip(_REPLACEMENT)) if self._open <= _MAX_INCOMPLETE else final - 1
        else:
            self._open = 0
        piece = text[self._shown : final]
        self._shown = max(self._shown, final)
        if (self._open == 0 and len(self._window) - self._mark >= _GROUP) or len(self._window) >= _WINDOW_LIMIT:
            self._slide()
        return piece

    def flush(self) -> str:
        """Return the text held back; an incomplete character shows as U+FFFD, as if all ids were decoded at once."""
        piece = self._text[self._shown :]
        self._shown = max(self._shown, len(self._text))
        return piece

    def _slide(self) -> None:
        window = self._window[self._mark if self._open == 0 else -_GROUP :]
        text = self._decode(window)
        if self._open == 0 and not text:
            if len(self._window) < _WINDOW_LIMIT:
                return  # ids without text are no context to decode the next ones in
            window = window[-_GROUP:]
        held = max(0, len(self._text) - self._shown)
        self._window, self._mark, self._text = window, len(window), text
        self._shown = max(0, len(text) - held)


def _opening(decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> tuple[list[int], str]:
    """Return the last few ids of `context` and their text, which begins with a whole character if one of four
    beginnings does."""
    window, text = list(context[-_GROUP:]), ""
    for size in range(_GROUP, _GROUP + _MAX_INCOMPLETE + 1):
        window = list(context[-size:])
        text = decode(window) if window else ""
        if not text.startswith(_REPLACEMENT):
            break
    return window, text


class StopMatcher:
    """A filter that passes text on up to the first stop string, and swallows the rest.

    The first stop string is the one that ends first; of those that end together, the longest. So the outcome does not
    depend on how the text was cut into pieces. Text that may yet become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._first = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Return the text that is final now, and whether a stop string was met."""
        if not self._stops or not piece:
            return piece, False
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = self._prefix_at_end(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """Return the text held back, once no more text follows."""
        held, self._held = self._held, ""
        return held

    def _prefix_at_end(self, text: str) -> int:
        """Return where the longest end of `text` that begins a stop string starts; len(text) if there is none."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first and any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)


class Generation:
    """One request being decoded, apart from the model: ids in, events out. Only the engine thread calls it."""

    def __init__(self, request: GenerationRequest, codec: Codec) -> None:
        self.request = request
        self.generated: list[int] = []
        self.emitted = 0  # characters of text handed out
        self.finished: Finish | None = None
        self._detokeniser = Detokeniser(codec.decode, request.prompt)
        self._matcher = StopMatcher(request.stop)
        self._ready = ""  # final text that a snapshot says was not handed out
        self._counts: dict[int, int] = {}
        self._seen: set[int] = set(request.prompt) if request.sampling.repetition_penalty != 1.0 else set()

    @classmethod
    def restore(cls, state: GenerationState, codec: Codec) -> Generation:
        """Return a generation that goes on after `state`. Raise ValueError, with the reason, if that is impossible."""
        if state.version != STATE_VERSION:
            raise ValueError(f"its format has version {state.version}, this engine reads version {STATE_VERSION}")
        generation = cls(state.request, codec)
        text = "".join([generation.advance(token).text for token in state.generated])
        if generation.finished:
            raise ValueError("it is complete already")
        if not 0 <= state.emitted <= len(text):
            raise ValueError(f"it claims {state.emitted} characters of text, its tokens make {len(text)}")
        generation.emitted, generation._ready = state.emitted, text[state.emitted :]
        return generation

    def state(self, engine: str, revision: str, kv: tuple[KVRow, ...] = (), arithmetic: str = "") -> GenerationState:
        """Return the state from which `restore` goes on, for an engine of the kind `engine` on `revision`."""
        generated = tuple(self.generated)
        return GenerationState(STATE_VERSION, engine, revision, self.request, generated, self.emitted, kv, arithmetic)

    @property
    def length(self) -> int:
        """The number of tokens of prompt and answer together, which is the next token's position."""
        return len(self.request.prompt) + len(self.generated)

    def sample(self, scores: NDArray[np.floating[Any]]) -> int:
        """Return the next token, drawn from the model's `scores` [vocabulary]."""
        return sample(scores, self.request.sampling, self.length, self._seen, self._counts)

    def draw(self, scores: NDArray[np.floating[Any]]) -> TokenEvent:
        """Draw the next token and take it in, with the log-probabilities asked for; a stop id has none."""
        token, wanted = self.sample(scores), self.request.logprobs
        silent = wanted is None or token in self.request.stop_ids
        return self.advance(token, None if silent else logprobs(scores, token, wanted or 0))

    def advance(self, token: int, chances: Logprobs | None = None) -> TokenEvent:
        """Take the next token in; the event has the text that became final, and whether the token was the last."""
        index = len(self.generated)
        self.generated.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.request.sampling.repetition_penalty != 1.0:
            self._seen.add(token)
        if token in self.request.stop_ids:
            self.finished = "stop"
            text, stopped = self._matcher.feed(self._detokeniser.flush())
        else:
            text, stopped = self._matcher.feed(self._detokeniser.push(token))
            if stopped:
                self.finished = "stop"
            elif len(self.generated) >= self.request.max_tokens:
                rest, stopped = self._matcher.feed(self._detokeniser.flush())
                text += rest
                self.finished = "stop" if stopped else "length"
        if self.finished and not stopped:
            text += self._matcher.flush()
        text, self._ready = self._ready + text, ""
        self.emitted += len(text)
        return TokenEvent(index, token, text, self.finished, None, chances)

    def end(self, finish: Finish, error: str | None = None) -> TokenEvent:
        """End the generation for a reason outside of it; text held back is not sent: another replica may do so."""
        self.finished = finish
        return TokenEvent(len(self.generated), None, "", finish, error)
