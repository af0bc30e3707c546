"""Owns attention over rows of several requests in one forward pass, inside transformers' own model code.

    model(input_ids=[1, tokens], …, glowplug=Pack(…)) ──► every layer ──► attend ──► each request over its own rows

The tokens of all requests lie one after the other: requests with one token first (they decode), then pieces of prompts,
then padding. Everything but attention works on single tokens, so only attention has to tell requests apart. Query heads
that share a key head are laid out as so many queries of one head: then a single unmasked call serves a decoding
request, and no key is ever copied for its group.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from runtime.engine.rows import Rows, Shape
from runtime.engine.skeleton import skeleton

NAME = "glowplug"
_PACK = "glowplug"  # the keyword that brings a `Pack` through the model's forward to `attend`

# transformers passes a four-dimensional mask on as it is, and so spends no time on making a mask that is never read.
_NO_MASK = torch.empty(1, 1, 0, 0)

_INSTALLED = "_glowplug_shape"  # the attribute of a model in which `install` leaves the model's `Shape`
_KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class Pack:
    """The rows of one forward pass and the tokens added to each: (rows, tokens), those of one token first.

    The views of all layers are made at once, because one by one they would cost as much as the attention itself.
    """

    def __init__(self, pieces: Sequence[tuple[Rows, int]], padding: int = 0) -> None:
        self.pieces = pieces
        self.padding = padding
        self.singles = sum(count == 1 for _, count in pieces)
        self.sizes = [count for _, count in pieces]
        for rows, count in pieces:
            rows.make_room(rows.fed + count)
        targets = [rows.kv[:, rows.fed : rows.fed + count].unbind(0) for rows, count in pieces]
        self.targets = [list(layer) for layer in zip(*targets, strict=True)]
        self._views: dict[int, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self._masks: dict[int, list[torch.Tensor]] = {}

    def views(self, window: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return keys and values, each [1, heads, positions, size], by layer and piece.

        They are those of the last `window` positions that the piece's queries may see; 0: of all positions.
        """
        if window not in self._views:
            pieces = []
            for rows, count in self.pieces:
                first = max(0, rows.fed + 1 - window) if window else 0
                # [layers, 1, heads, positions, size]
                kv = rows.kv[:, first : rows.fed + count].transpose(1, 2).unsqueeze(1)
                size = rows.shape.key
                pieces.append(list(zip(kv[..., :size].unbind(0), kv[..., size:].unbind(0), strict=True)))
            self._views[window] = [list(layer) for layer in zip(*pieces, strict=True)]
        return self._views[window]

    def masks(self, window: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the addends to the scores of each piece of several tokens: [groups · tokens, positions]."""
        if window not in self._masks:
            masks = []
            for rows, count in self.pieces[self.singles :]:
                first = max(0, rows.fed + 1 - window) if window else 0
                device = rows.kv.device
                query = torch.arange(rows.fed, rows.fed + count, device=device)[:, None]
                position = torch.arange(first, rows.fed + count, device=device)[None, :]
                hidden = position > query
                if window:
                    hidden |= position <= query - window
                mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
                masks.append(mask.repeat(groups, 1))
            self._masks[window] = masks
        return self._masks[window]

    def done(self) -> None:
        """Count the pass's tokens as fed, once the forward pass has put them into the rows."""
        for rows, count in self.pieces:
            rows.fed += count


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention for transformers' interface: query [1, heads, tokens, size] to [1, tokens, heads, size].

    Without a `Pack` this is transformers' `sdpa`, for code that calls the model directly.
    """
    pack: Pack | None = more.pop(_PACK, None)
    if pack is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return result
    layer, window, singles = module.layer_idx, sliding_window or 0, pack.singles
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
    groups = heads // kv_heads
    tokens = query.shape[2] - pack.padding
    fresh = torch.cat((key[0, :, :tokens], value[0, :, :tokens]), -1).transpose(0, 1)
    torch._foreach_copy_(pack.targets[layer], torch.split(fresh, pack.sizes))
    views = pack.views(window)[layer]
    parts = []
    if singles:
        queries = query[0, :, :singles].transpose(0, 1).reshape(singles, 1, kv_heads, groups, size).unbind(0)
        found = [
            scaled_dot_product_attention(one, keys, values, scale=scaling)
            for one, (keys, values) in zip(queries, views, strict=False)
        ]
        parts.append(torch.cat(found).reshape(singles, heads, -1))
    if singles < len(views):
        at = singles
        masks = pack.masks(window, groups, query.dtype)
        for count, (keys, values), mask in zip(pack.sizes[singles:], views[singles:], masks, strict=True):
            some = query[0, :, at : at + count].reshape(1, kv_heads, groups * count, size)
            many = scaled_dot_product_attention(some, keys, values, attn_mask=mask, scale=scaling)
            parts.append(many.reshape(heads, count, -1).transpose(0, 1))
            at += count
    if pack.padding:
        parts.append(query.new_zeros(pack.padding, heads, value.shape[3]))
    return torch.cat(parts).unsqueeze(0), None


def forward(model: Any, ids: Sequence[int], positions: Sequence[int], pack: Pack, **more: Any) -> Any:
    """Run one forward pass of a transformers model (or its base) over the packed `ids` at their `positions`."""
    device = model.device
    output = model(
        input_ids=torch.tensor((ids,), device=device),
        position_ids=torch.tensor((positions,), device=device),
        attention_mask=_NO_MASK,
        use_cache=False,
        **{_PACK: pack},
        **more,
    )
    pack.done()
    return output


class Unbatchable(Exception):
    """A model whose attention cannot be replaced by ours; the text says why."""


def install(model: Any) -> Shape:
    """Make `attend` the attention of `model` and return the shape of a token's keys and values.

    Models of unknown classes are tried first, on an empty copy with a layer of each kind. Raise `Unbatchable`; the
    model is then as it was. Once is enough for a model: a layer that has installed it has done so for all its forks.
    """
    before = model.__dict__.get(_INSTALLED)
    if isinstance(before, Shape) and (before.dtype, before.device) == (model.dtype, model.device):
        return before
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for direct calls, as in `attend`
    shape = known(model) or tried(model)
    model.set_attn_implementation(NAME)
    model.__dict__[_INSTALLED] = shape
    return shape


def known(model: Any) -> Shape | None:
    """Return the result that `tried` would have, for a model of a common class; None for others.

    Trying imports sympy, which takes a quarter of a start. Tests compare the two functions, for the versions of the
    locked base set.
    """
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    ours = type(model).__module__.startswith("transformers.models.")
    if not ours or type(model).__name__ not in _KNOWN or set(kinds) - _LAYER_TYPES:
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(config.num_hidden_layers, config.num_key_value_heads, size, size, model.dtype, model.device)


def tried(model: Any) -> Shape:
    """Return the shape of a token's keys and values, found by a run of an empty copy. Raise `Unbatchable`."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise Unbatchable(f"{name} does not take its attention from transformers' interface")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise Unbatchable(f"{name} attends to an encoder")
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))
    if set(kinds) - _LAYER_TYPES:
        raise Unbatchable(f"{name} has layers of type {', '.join(sorted(set(kinds) - _LAYER_TYPES))}")
    seen: list[tuple[int, int, int]] = []
    layers = config.num_hidden_layers
    try:
        small = _sample_of(model, config, kinds)
        probe = _Probe(seen)
        with torch.inference_mode():
            output = small(
                input_ids=torch.zeros((1, 2), dtype=torch.long, device="meta"),
                position_ids=torch.zeros((1, 2), dtype=torch.long, device="meta"),
                attention_mask=_NO_MASK,
                use_cache=False,
                logits_to_keep=torch.zeros(1, dtype=torch.long, device="meta"),
                **{_PACK: probe},
            )
    except Unbatchable:
        raise
    except Exception as error:
        raise Unbatchable(f"{name} could not be tried ({type(error).__name__}: {error})") from error
    if len(seen) != len(kinds):
        raise Unbatchable(f"{name} called the attention function {len(seen)} times in {len(kinds)} layers")
    if len(set(seen)) != 1:
        raise Unbatchable(f"{name} has layers of different shape: {sorted(set(seen))}")
    if output.logits.shape[1] != 1:
        raise Unbatchable(f"{name} cannot be asked for the scores of single tokens")
    heads, key, value = seen[0]
    return Shape(layers, heads, key, value, model.dtype, model.device)


def _sample_of(model: Any, config: Any, kinds: Sequence[str]) -> Any:
    """Return an empty copy of `model` on the meta device, with one layer of each kind; runs of it compute nothing."""
    if config is not model.config:
        raise Unbatchable(f"{type(model).__name__} is more than a language model")
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = list(kinds)
    config.num_hidden_layers = len(kinds)
    AttentionInterface.register(_Probe.name, _Probe.attend)
    small = skeleton(type(model), config).to("meta")
    small.set_attn_implementation(_Probe.name)
    return small.eval()


class _Probe:
    """A stand-in for a `Pack` that notes the shapes with which each layer's attention is called."""

    name = "glowplug-probe"

    def __init__(self, seen: list[tuple[int, int, int]]) -> None:
        self.seen = seen

    @staticmethod
    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, **more: Any
    ) -> tuple[torch.Tensor, None]:
        probe: _Probe = more[_PACK]
        probe.seen.append((key.shape[1], key.shape[3], value.shape[3]))
        for name, what in (("softcap", "caps its attention scores"), ("s_aux", "has attention sinks")):
            if more.get(name) is not None:
                raise Unbatchable(f"{type(module).__name__} {what}")
        if not isinstance(getattr(module, "layer_idx", None), int) or query.shape[1] % key.shape[1]:
            raise Unbatchable(f"{type(module).__name__} is an attention of an unknown kind")
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None
