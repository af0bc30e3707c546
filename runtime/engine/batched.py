"""Owns the engine that serves: transformers' model code, many requests in one forward pass, each with rows of its own.

    step: rows ──► memory, reused beginnings ──► schedule.plan ──► forward … ──► scores ──► one token per row

One number, `fed`, counts the tokens of a generation that the model has seen. Ids are fed in pieces or one by one until
the model has seen all; the scores after the last id make the next token. A generation that arrives without rows is
fed again by the very same steps: in pieces where the arithmetic allows it (float32), otherwise one by one, as before.

Memory for the whole of a generation is set aside before the generation gets its slot, so no running generation fails
or is ended for want of memory. Memory that is not promised holds the rows of finished generations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from runtime.engine.attention import Pack, forward, install
from runtime.engine.base import Codec, KVRow, TokenEvent
from runtime.engine.bounds import Bounds
from runtime.engine.generation import Generation
from runtime.engine.loop import UNWATCHED, EngineWatch, Loop, Row
from runtime.engine.prefixes import Prefixes, encoded
from runtime.engine.rows import Rows, dtype_name
from runtime.engine.schedule import Forward, Need, plan
from runtime.errors import EngineBusy, SnapshotRefused

_WORTH = 16  # tokens that a beginning must have to be copied, or cached


class BatchedEngine(Loop[Rows]):
    """An engine on `model`, a transformers causal language model. Raises `Unbatchable` if its attention cannot be ours.

    `memory` bounds keys and values, in bytes. `chunk` is the number of prompt tokens per step, `fixed` the number of
    rows that deterministic decoding is padded to, `threads` torch's thread count for the engine thread (None: torch's
    own). `deterministic` makes every request so; `reuse` caches the rows of finished generations.
    """

    kind = "batched"

    def __init__(
        self,
        model: Any,
        codec: Codec,
        *,
        revision: str,
        memory: int,
        context_length: int | None = None,
        slots: int = 16,
        queue_size: int = 32,
        chunk: int = 256,
        fixed: int = 8,
        deterministic: bool = False,
        reuse: bool = True,
        threads: int | None = None,
        watch: EngineWatch = UNWATCHED,
    ) -> None:
        self.shape = install(model)
        length = context_length or model.config.get_text_config(decoder=True).max_position_embeddings
        vocabulary = model.get_input_embeddings().num_embeddings
        super().__init__(
            codec,
            revision=revision,
            bounds=Bounds(length, vocabulary, memory, self.shape.token_bytes),
            slots=slots,
            queue_size=queue_size,
            watch=watch,
        )
        self._model = model.eval() if model.training else model
        self._chunk, self._fixed = chunk, fixed
        self._always, self._reuse = deterministic, reuse
        self._threads = threads
        self._prefixes: Prefixes[Rows] = Prefixes()
        self._reused = 0
        self._refeed = self.shape.dtype == torch.float32  # whether answers, too, may be fed again in pieces
        self._token_seconds = self._prompt_seconds = 0.0  # smoothed time of a decoding pass, and of a prompt's token
        device = self.shape.device.type
        processor = torch.backends.cpu.get_cpu_capability() if device == "cpu" else device
        self.arithmetic = (
            f"{fixed} rows, pieces of {chunk}, {threads or torch.get_num_threads()} threads, {processor}, "
            f"{dtype_name(self.shape.dtype)}, torch {torch.__version__}"
        )
        self.start()

    def close(self) -> None:
        super().close()
        with self._wake:
            self._prefixes = Prefixes()

    def begin(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    # Memory: promised to live rows first, else holding the cached rows of finished generations.

    def promise(self, size: int) -> bool:
        promised = super().promise(size)
        self._make_way()
        return promised

    def cached(self) -> tuple[int, int]:
        return self._prefixes.nbytes, self._reused

    def _make_way(self) -> None:
        """Evict cached rows until all that is promised has its memory. The lock is held."""
        assert self._bounds.memory is not None, "the constructor has a bound"
        while self._promised + self._prefixes.nbytes > self._bounds.memory:
            self._prefixes.evict()

    # A step.

    def step(self, rows: Sequence[Row[Rows]]) -> Iterator[tuple[Row[Rows], TokenEvent]]:
        for row in rows:
            if row.memory is None:
                request = row.generation.request
                row.memory = Rows(self.shape, len(request.prompt) + request.max_tokens)
            if row.memory.fed == 0 and self._reuse:
                self._begin_from_others(row, row.memory)
        for passing in plan([self._need(row) for row in rows], self._chunk, self._fixed):
            yield from self._pass([(rows[i], count) for i, count in passing.pieces], passing)

    def _need(self, row: Row[Rows]) -> Need:
        generation, memory = row.generation, _memory(row)
        exact = self._exact(generation)
        return Need(len(generation.request.prompt), generation.length, memory.fed, exact, self._refeed and not exact)

    def _exact(self, generation: Generation) -> bool:
        return self._always or generation.request.deterministic

    def _pass(
        self, pieces: Sequence[tuple[Row[Rows], int]], passing: Forward
    ) -> Iterator[tuple[Row[Rows], TokenEvent]]:
        """Make one forward pass, and draw the next token of every row whose ids have then all been fed."""
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []  # places in the pass whose scores make a next token
        ready: list[Row[Rows]] = []
        for row, count in pieces:
            fed = _memory(row).fed
            ids += _ids(row.generation, fed, fed + count)
            positions += range(fed, fed + count)
            if fed + count == row.generation.length:
                wanted.append(len(ids) - 1)
                ready.append(row)
        ids += [0] * passing.padding
        positions += [0] * passing.padding
        keep, wanted_of = wanted, list(range(len(wanted)))
        if passing.fixed:
            keep, wanted_of = list(range(len(ids))), wanted  # so the head's product has always the same rows, too
        pack = Pack([(_memory(row), count) for row, count in pieces], passing.padding)
        begun = time.perf_counter()
        with torch.inference_mode():
            output = forward(self._model, ids, positions, pack, logits_to_keep=torch.tensor(keep, dtype=torch.long))
            scores = output.logits[0, wanted_of].float().cpu().numpy() if wanted else None
        self._timed(max(count for _, count in pieces), len(ids), time.perf_counter() - begun)
        for row, count in pieces:
            memory = _memory(row)
            if self._exact(row.generation) and memory.exact == memory.fed - count and memory.fed % self._chunk == 0:
                memory.exact = memory.fed
        for number, row in enumerate(ready):
            assert scores is not None, "there are scores for every row that is ready"
            try:
                event = row.generation.draw(scores[number])
            except ArithmeticError as error:  # no other row is affected
                event = row.generation.end("error", f"the model failed on this request: {error}")
            yield row, event
            if event.finish in ("stop", "length"):
                self._cache(row)

    def _timed(self, longest: int, tokens: int, seconds: float) -> None:
        if longest == 1:
            self._token_seconds += 0.2 * (seconds - self._token_seconds)
        elif longest >= _WORTH:
            self._prompt_seconds += 0.5 * (seconds / tokens - self._prompt_seconds)

    def again(self, generation: Generation) -> float:
        if not self._prompt_seconds:
            return 0.0
        pieces = generation.length if self._refeed else len(generation.request.prompt)
        return pieces * self._prompt_seconds + (generation.length - pieces) * self._token_seconds

    # Reuse.

    def _begin_from_others(self, row: Row[Rows], memory: Rows) -> None:
        """Copy the longest beginning that a cached or a running generation has in common with this row's ids."""
        generation = row.generation
        exact = self._exact(generation)
        ids = encoded(_ids(generation, 0, generation.length if self._refeed else len(generation.request.prompt)))
        with self._wake:
            others = [
                (encoded(_ids(other.generation, 0, other.memory.fed)), other.memory)
                for other in self._stepping
                if other.memory is not None and other.memory.fed >= _WORTH
            ]
            found = self._prefixes.find(ids, others)
        if found is None:
            return
        source, length = found
        length = min(length, source.fed, len(ids) // 4 - 1)  # the last id has to be fed: its scores are wanted
        if exact:
            length = min(length, source.exact) // self._chunk * self._chunk
        if length >= _WORTH:
            memory.take(source, length)
            self._reused += length

    def _cache(self, row: Row[Rows]) -> None:
        """Cache the rows of a generation that has ended well, if there is memory that is not promised."""
        memory = _memory(row)
        if not self._reuse or memory.fed < _WORTH:
            return
        memory.shrink()
        ids = encoded(_ids(row.generation, 0, memory.fed))
        with self._wake:
            self._prefixes.add(ids, memory)
            self._make_way()

    # Embeddings.

    def embed_one(self, prompt: Sequence[int]) -> list[float]:
        size = len(prompt) * self.shape.token_bytes
        with self._wake:
            if not self.promise(size):
                raise EngineBusy("the memory for keys and values is taken; try again later")
        try:
            rows = Rows(self.shape, len(prompt))

            def feed(at: int) -> torch.Tensor:
                ids = prompt[at : at + self._chunk]
                with torch.inference_mode():
                    pack = Pack([(rows, len(ids))])
                    states = forward(self._model.base_model, ids, range(at, at + len(ids)), pack)
                    return torch.as_tensor(states.last_hidden_state[0].float().sum(0))

            total = torch.zeros(())
            for at in range(0, len(prompt), self._chunk):
                total = total + self.call(lambda at=at: feed(at))  # type: ignore[misc]
            vector: list[float] = torch.nn.functional.normalize(total, dim=0).tolist()
            return vector
        finally:
            with self._wake:
                self._promised -= size
                self._wake.notify_all()

    # Export and import.

    def pack(self, row: Row[Rows]) -> tuple[KVRow, ...]:
        """Return rows "fed" and "exact" (int64), then "<layer>", each [positions, heads, key + value size]; () if
        nothing was fed yet."""
        memory = row.memory
        if memory is None or not memory.fed:
            return ()
        counts = [
            KVRow(name, "int64", (), value.to_bytes(8, "little"))
            for name, value in (("fed", memory.fed), ("exact", memory.exact))
        ]
        dtype = dtype_name(self.shape.dtype)
        layers = [
            KVRow(str(index), dtype, tuple(layer.shape), layer.contiguous().view(torch.uint8).cpu().numpy().tobytes())
            for index, layer in enumerate(memory.kv[:, : memory.fed])
        ]
        return (*counts, *layers)

    def unpack(self, generation: Generation, kv: tuple[KVRow, ...]) -> Rows:
        rows = {row.name: row for row in kv}
        if set(rows) != {"fed", "exact", *map(str, range(self.shape.layers))} or any(
            len(rows[name].data) != 8 for name in ("fed", "exact")
        ):
            raise SnapshotRefused(f"the snapshot's rows are not of the {self.shape.layers} layers of this model")
        fed, exact = (int.from_bytes(rows[name].data, "little") for name in ("fed", "exact"))
        if not 0 <= exact <= fed or not 0 < fed < generation.length:
            raise SnapshotRefused(f"the snapshot's rows cover {fed} tokens, it has {generation.length}")
        request = generation.request
        memory = Rows(self.shape, len(request.prompt) + request.max_tokens)
        memory.make_room(fed)
        for index in range(self.shape.layers):
            memory.kv[index, :fed] = self._layer(rows[str(index)], fed)
        memory.fed, memory.exact = fed, exact
        return memory

    def _layer(self, row: KVRow, positions: int) -> torch.Tensor:
        heads, size, dtype = self.shape.heads, self.shape.key + self.shape.value, self.shape.dtype
        shape = (positions, heads, size)
        if row.shape != shape or row.dtype != dtype_name(dtype):
            raise SnapshotRefused(
                f"layer {row.name} of the snapshot is {row.dtype}{list(row.shape)}, this model's is "
                f"{dtype_name(dtype)}{list(shape)}"
            )
        if len(row.data) != positions * heads * size * dtype.itemsize:
            raise SnapshotRefused(f"layer {row.name} of the snapshot has {len(row.data)} bytes, not its shape's")
        return torch.frombuffer(bytearray(row.data), dtype=dtype).reshape(shape)


def _memory(row: Row[Rows]) -> Rows:
    assert row.memory is not None, "a row in a step has its memory"
    return row.memory


def _ids(generation: Generation, start: int, end: int) -> Sequence[int]:
    """Return the ids `start` to `end` of prompt and answer."""
    prompt, generated = generation.request.prompt, generation.generated
    if start >= len(prompt):
        return generated[start - len(prompt) : end - len(prompt)]
    return (*prompt[start:end], *generated[: max(0, end - len(prompt))])
