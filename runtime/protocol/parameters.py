"""Owns the parameters of a generation: names, types, ranges, and a checkpoint's defaults. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypedDict

from runtime.engine.base import SamplingParams
from runtime.errors import BadRequest

_MAX_STOPS, _MAX_STOP_LENGTH, _MAX_BIASES = 16, 1000, 1024

# name: (least, most, whether the least value is allowed)
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
    """The parameters of a generation besides its prompt; absent or None means the default.

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
    logprobs: int | None = None  # not in `Params`: only the OpenAI routes, which read token events, can use them


def check(given: Mapping[str, object]) -> Parameters:
    """Check names, types and ranges, which needs no model. Raise `BadRequest` that names the parameter."""
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
            sampling[name] = integer(name, given[name], low, high)
    if "logit_bias" in given:
        sampling["logit_bias"] = _biases(given["logit_bias"])
    for name in ("ignore_eos", "deterministic"):
        if not isinstance(given.get(name, False), bool):
            raise BadRequest(f"{name} must be true or false", name)
    ids = given.get("stop_ids", ())
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise BadRequest("stop_ids must be a list of token ids", "stop_ids")
    stop_ids = frozenset(integer("stop_ids", token, 0, 2**31 - 1) for token in ids)
    flags = {name: bool(given.get(name, False)) for name in ("ignore_eos", "deterministic")}
    limit = sampling.pop("max_tokens", None)
    return Parameters(sampling, limit, _stops(given.get("stop", ())), stop_ids, **flags)


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling parameters of a generation_config.json, or OpenAI's defaults (temperature 1, no filter).

    Values that `check` refuses count as absent; an explicit `"do_sample": false` means greedy.
    """
    values: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        try:
            values |= check({name: generation_config.get(name)}).sampling
        except BadRequest:
            continue  # a value out of range is no reason not to serve the checkpoint
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0.0
    return SamplingParams(**values)


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise BadRequest(f"{name} must be a number, not {type(value).__name__}", name)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def integer(name: str, value: object, low: int, high: int) -> int:
    """Return the value as an int. Raise `BadRequest` that names the parameter."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise BadRequest(f"{name} must be an integer, not {type(value).__name__}", name)
    number = int(value)
    if not low <= number <= high:
        raise BadRequest(f"{name} is out of range; it must be {low}..{high}", name)
    return number


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping) or len(value) > _MAX_BIASES:
        raise BadRequest(f"logit_bias must map at most {_MAX_BIASES} token ids to numbers", "logit_bias")
    biases = {integer("logit_bias", token, 0, 2**31 - 1): _number("logit_bias", bias) for token, bias in value.items()}
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
