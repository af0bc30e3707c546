"""A process that decodes a batch in one way, on a thread, and prints one JSON line.

    python -m benchmarks.throughput_child WAY MODEL DTYPE CONCURRENT PROMPT NEW THREADS

It loads the model, decodes a first batch of other prompts to warm up, then the one that is measured.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from benchmarks.traffic import clients, dice

Prompts = Sequence[Sequence[int]]
Decode = Callable[[Prompts, int], int]  # the number of tokens made

_PAGE = 256


def sequential(model: Any, _place: Path, _threads: int) -> Decode:
    def decode(prompts: Prompts, new: int) -> int:
        return sum(_generate(model, [prompt], new) for prompt in prompts)

    return decode


def padded(model: Any, _place: Path, _threads: int) -> Decode:
    return lambda prompts, new: _generate(model, prompts, new)


def _generate(model: Any, prompts: Prompts, new: int) -> int:
    ids = torch.tensor(prompts)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return int(out.shape[0] * (out.shape[1] - ids.shape[1]))


def generate_batch(model: Any, _place: Path, _threads: int) -> Decode:
    """Decode with transformers' continuous batching; its manager is kept, so that its start is not measured."""
    wanted = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[no-untyped-call]

    def decode(prompts: Prompts, new: int) -> int:
        blocks = len(prompts) * -(-(len(prompts[0]) + new) // _PAGE) + 2
        batching = ContinuousBatchingConfig(page_size=_PAGE, num_blocks=blocks, max_batch_tokens=512)
        found = model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=wanted,
            continuous_batching_config=batching,
            max_new_tokens=new,
            persistent_manager=True,
        )
        return sum(len(one.generated_tokens) for one in found.values())

    return decode


def glowplug(model: Any, place: Path, threads: int, *, deterministic: bool = False) -> Decode:
    from runtime.engine.base import GenerationRequest, SamplingParams

    engine = _engine(model, place, threads, deterministic=deterministic)

    def decode(prompts: Prompts, new: int) -> int:
        streams = [
            engine.submit(GenerationRequest(str(number), tuple(prompt), new, SamplingParams(0.0)))
            for number, prompt in enumerate(prompts)
        ]
        return sum(event.token is not None for stream in streams for event in stream)

    return decode


def deterministic(model: Any, place: Path, threads: int) -> Decode:
    return glowplug(model, place, threads, deterministic=True)


def http(model: Any, place: Path, threads: int) -> Decode:
    """Decode behind the function's own HTTP server; the clients are another process."""
    from cache_agent.ledger import Ledger
    from runtime.config import FunctionConfig
    from runtime.engine.base import SamplingParams
    from runtime.function.model import Model
    from runtime.http.application import Application
    from runtime.http.lifecycle import Lifecycle
    from runtime.http.server import HttpServer

    engine = _engine(model, place, threads)
    config, lifecycle = FunctionConfig(model="bench"), Lifecycle("bench", 64)
    lifecycle.opened(Model("bench", "bench", engine.codec, engine, defaults=SamplingParams(0.0)), None)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    app = Application(config, lifecycle, Ledger("worker"), lambda _reason: None)
    server = HttpServer(listener, app, capacity=64, parent=os.getppid(), on_beat=lambda: None)
    threading.Thread(target=server.run_until_stopped, daemon=True).start()

    def decode(prompts: Prompts, new: int) -> int:
        bodies = [{"prompt": p, "max_tokens": new, "temperature": 0, "ignore_eos": True} for p in map(list, prompts)]
        results = clients(listener.getsockname()[1], [{"at": 0.0, "body": body} for body in bodies])
        return sum(int(result["tokens"]) for result in results)

    return decode


def _engine(model: Any, place: Path, threads: int, *, deterministic: bool = False) -> Any:
    from runtime.engine.batched import BatchedEngine
    from runtime.engine.serial import TokenizerCodec

    codec = TokenizerCodec(AutoTokenizer.from_pretrained(place))
    return BatchedEngine(
        model, codec, revision="bench", memory=2 << 30, threads=threads, deterministic=deterministic, queue_size=64
    )


WAYS = {way.__name__: way for way in (sequential, padded, generate_batch, glowplug, deterministic, http)}


def main(way: str, place: str, dtype: str, concurrent: int, prompt: int, new: int, threads: int) -> None:
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)  # type: ignore[no-untyped-call]
    decode = WAYS[way](model, Path(place), threads)
    chance = dice(1)

    def prompts() -> Prompts:
        return [[chance.randrange(3, model.config.vocab_size) for _ in range(prompt)] for _ in range(concurrent)]

    decode(prompts(), max(4, new // 8))
    counted = prompts()
    cpu, wall = _cpu(), time.perf_counter()
    made = decode(counted, new)
    seconds, used = time.perf_counter() - wall, _cpu() - cpu
    assert made == concurrent * new, f"{made} tokens instead of {concurrent * new}"
    print(
        json.dumps({"tokens_s": made / seconds, "cpu_ms_per_token": used / made * 1e3, "wall_s": seconds}), flush=True
    )


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    arguments = sys.argv[1:]
    failed: list[BaseException] = []

    def body() -> None:
        try:
            main(arguments[0], arguments[1], arguments[2], *map(int, arguments[3:]))
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(1 if failed else 0)  # kept managers and servers have threads of their own
