"""Owns the engine for models that cannot be batched: one forward pass of transformers' code per generation and step.

Generations take turns: each turn is one chunk of a prompt or one token, so a long prompt delays other generations by no
more than a chunk. Each generation has a cache of its own, hence neither its scores nor its cache depend on other
generations, in bf16 either. One number, `fed`, counts the tokens that the model has seen: prompt ids are fed by chunks,
generated ids one by one. An admitted generation without a cache is recomputed by the very same steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from runtime.engine.base import Codec, KVRow, TokenEvent
from runtime.engine.bounds import Bounds
from runtime.engine.generation import Generation
from runtime.engine.loop import UNWATCHED, EngineWatch, Loop, Row
from runtime.engine.rows import dtype_name
from runtime.errors import BadRequest, SnapshotRefused


class SerialCache:
    """The cache of one generation and the number of its tokens that the model has seen."""

    def __init__(self, cache: Any, fed: int = 0) -> None:
        self.cache = cache  # a DynamicCache of transformers, which has no useful type for its layers
        self.fed = fed


class SerialEngine(Loop[SerialCache]):
    """An engine on `model`, a transformers causal language model, as it stands: dtype, device, attention.

    `chunk` is the number of prompt tokens per step, `threads` torch's thread count for the engine thread (None: torch's
    own), `context_length` defaults to the one in the model's config. `memory` bounds the bytes of all caches. A token
    is charged as keys and values in every layer, also where a model remembers something else.
    """

    kind = "serial"

    def __init__(
        self,
        model: Any,
        codec: Codec,
        *,
        revision: str,
        context_length: int | None = None,
        slots: int = 4,
        queue_size: int = 16,
        chunk: int = 512,
        threads: int | None = None,
        memory: int | None = None,
        watch: EngineWatch = UNWATCHED,
    ) -> None:
        self._config = config = model.config.get_text_config(decoder=True)
        heads, size = _head_shape(config)
        length = context_length or config.max_position_embeddings
        vocabulary = model.get_input_embeddings().num_embeddings
        token_bytes = config.num_hidden_layers * 2 * heads * size * model.dtype.itemsize
        super().__init__(
            codec,
            revision=revision,
            bounds=Bounds(length, vocabulary, memory, token_bytes),
            slots=slots,
            queue_size=queue_size,
            watch=watch,
        )
        self._model = model.eval()
        self._chunk = chunk
        self._threads = threads
        self.start()

    def begin(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    def choose(self, rows: Sequence[Row[SerialCache]]) -> Sequence[Row[SerialCache]]:
        # The least recently served row is the first: after its turn a row goes to the back of the engine's list.
        row = rows[0]
        self._running.remove(row)
        self._running.append(row)
        return (row,)

    def step(self, rows: Sequence[Row[SerialCache]]) -> Iterable[tuple[Row[SerialCache], TokenEvent]]:
        (row,) = rows
        generation = row.generation
        memory = row.memory = row.memory or SerialCache(DynamicCache(config=self._config))
        prompt, at = generation.request.prompt, memory.fed
        ids = prompt[at : at + self._chunk] or (generation.generated[at - len(prompt)],)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor((ids,), device=self._model.device),
                past_key_values=memory.cache,
                use_cache=True,
                # The position's number selects a contiguous row; the product of a slice with the head is slow.
                logits_to_keep=torch.tensor([len(ids) - 1], device=self._model.device),
            )
            scores = output.logits[0, -1].float().cpu().numpy()
        memory.fed += len(ids)
        if memory.fed == generation.length:
            yield row, generation.draw(scores)

    def embed_one(self, prompt: Sequence[int]) -> list[float]:
        cache = DynamicCache(config=self._config)

        def forward(ids: Sequence[int]) -> torch.Tensor:
            with torch.inference_mode():
                inputs = torch.tensor((ids,), device=self._model.device)
                states = self._model.base_model(input_ids=inputs, past_key_values=cache, use_cache=True)
                return torch.as_tensor(states.last_hidden_state[0].float().sum(0))

        total = torch.zeros(())
        for at in range(0, len(prompt), self._chunk):
            ids = prompt[at : at + self._chunk]
            total = total + self.call(lambda ids=ids: forward(ids))  # type: ignore[misc]
        vector: list[float] = torch.nn.functional.normalize(total, dim=0).tolist()
        return vector

    def pack(self, row: Row[SerialCache]) -> tuple[KVRow, ...]:
        """Return rows "fed" (int64), then "<layer>.k" and "<layer>.v", each [1, heads, positions, head size].

        A layer with a sliding window has only the positions that are still in the window. () if nothing was fed yet, or
        if the model remembers something else than keys and values: then the receiver recomputes.
        """
        memory = row.memory
        if memory is None or not memory.fed:
            return ()
        rows = [KVRow("fed", "int64", (), memory.fed.to_bytes(8, "little"))]
        for index, layer in enumerate(memory.cache.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
                return ()
            for name, tensor in (("k", layer.keys), ("v", layer.values)):
                data = tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()
                rows.append(KVRow(f"{index}.{name}", dtype_name(tensor.dtype), tuple(tensor.shape), data))
        return tuple(rows)

    def unpack(self, generation: Generation, kv: tuple[KVRow, ...]) -> SerialCache:
        rows = {row.name: row for row in kv}
        cache: Any = DynamicCache(config=self._config)
        names = [f"{index}.{part}" for index in range(len(cache.layers)) for part in "kv"]
        if set(rows) != {"fed", *names} or len(rows["fed"].data) != 8:
            raise SnapshotRefused(f"the snapshot's cache does not have the {len(cache.layers)} layers of this model")
        fed = int.from_bytes(rows["fed"].data, "little")
        if not 0 < fed < generation.length:
            raise SnapshotRefused(f"the snapshot's cache covers {fed} tokens, it has {generation.length}")
        for index, layer in enumerate(cache.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise SnapshotRefused("this model's cache cannot be restored; send the snapshot without it")
            sliding = isinstance(layer, DynamicSlidingWindowLayer)
            positions = min(fed, layer.sliding_window - 1) if sliding else fed
            keys, values = (self._tensor(rows[f"{index}.{part}"], positions) for part in "kv")
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if sliding:
                layer.cumulative_length = fed
        return SerialCache(cache, fed)

    def _tensor(self, row: KVRow, positions: int) -> torch.Tensor:
        config = self._config
        heads, size = _head_shape(config)
        shape, dtype = (1, heads, positions, size), self._model.dtype
        if row.shape != shape or row.dtype != dtype_name(dtype):
            raise SnapshotRefused(
                f"the snapshot's cache row {row.name} is {row.dtype}{list(row.shape)}, "
                f"this model's is {dtype_name(dtype)}{list(shape)}"
            )
        if len(row.data) != dtype.itemsize * heads * positions * size:
            raise SnapshotRefused(f"the snapshot's cache row {row.name} has {len(row.data)} bytes, not its shape's")
        return torch.frombuffer(bytearray(row.data), dtype=dtype).reshape(shape).to(self._model.device)


def _head_shape(config: Any) -> tuple[int, int]:
    """Return the number of key heads and their size; a model without attention counts as one head."""
    queries = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or queries
    return heads, getattr(config, "head_dim", None) or config.hidden_size // queries


class TokenizerCodec:
    """A `Codec` over a transformers tokenizer.

    `eos_ids` are added to the tokenizer's (generation_config.json may name several). Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int] = ()) -> None:
        self.eos_ids = frozenset(eos_ids) | ({tokenizer.eos_token_id} - {None})
        self.vocabulary = len(tokenizer)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        # Encoding may change the Rust tokenizer's settings, which fails while another thread is encoding.
        self._encoding = threading.Lock()

    def encode(self, text: str) -> list[int]:
        with self._encoding:
            ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        if self._backend is not None:  # ten times quicker than the wrapper, and the engine decodes for every token
            text: str = self._backend.decode(ids, skip_special_tokens=True)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None = None) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise BadRequest("this model has no chat template; send a plain prompt instead of messages", "messages")
        try:
            with self._encoding:
                ids: list[int] = self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
                )
        except Exception as error:
            # Templates are the model's code and raise anything, mostly about roles and their order.
            raise BadRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return ids
