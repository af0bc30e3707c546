"""One load in a fresh process: imports first, then on a line from the parent loads and runs one token.

Prints one JSON line: `first_s` from the go until the first forward is done, `warm_s` a second forward, `cpu_s`.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging


def from_pretrained(place: Path, _socket: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype="auto")


def mmap_assign(place: Path, _socket: str) -> Any:
    from safetensors.torch import load_file

    return _assigned(place, {k: v for file in sorted(place.glob("*.safetensors")) for k, v in load_file(file).items()})


def runai(place: Path, _socket: str) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    tensors = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in sorted(place.glob("*.safetensors"))])
        for name, tensor in streamer.get_tensors():
            tensors[name] = tensor.clone()  # its buffer is used again
    return _assigned(place, tensors)


def fastsafetensors(place: Path, _socket: str) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [str(file) for file in sorted(place.glob("*.safetensors"))]})
    buffer = loader.copy_files_to_device()
    _keep.extend((loader, buffer))
    return _assigned(place, {name: buffer.get_tensor(name) for name in loader.get_keys()})


def tensorizer(place: Path, _socket: str) -> Any:
    from tensorizer import TensorDeserializer

    model = _skeleton(place)
    deserializer = TensorDeserializer(str(place / "model.tensors"), device="cpu")
    deserializer.load_into_module(model)
    return model


def glowplug(place: Path, socket: str) -> Any:
    from cache_agent.client import CacheClient
    from runtime import weights

    lease = CacheClient(socket).lease(f"file://{place}")
    lease.wait_ready(time.monotonic() + 120)
    _keep.append(lease)
    return weights.assemble(weights.Weights(lease)).model


_keep: list[Any] = []


def _skeleton(place: Path) -> Any:
    config = AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]


def _assigned(place: Path, tensors: dict[str, torch.Tensor]) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        None,  # type: ignore[arg-type]
        config=AutoConfig.from_pretrained(place),
        state_dict=tensors,
        dtype="auto",
    )


WAYS = {
    function.__name__: function
    for function in (from_pretrained, mmap_assign, runai, fastsafetensors, tensorizer, glowplug)
}


def main(way: str, place: str, socket: str, threads: str) -> None:
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(int(threads))
    config = AutoConfig.from_pretrained(place)
    _ = AutoModelForCausalLM._model_mapping[type(config)]  # the class's own import is no part of loading
    if way == "glowplug":
        importlib.import_module("runtime.weights")
    token = torch.tensor([[1]])
    print("ready", flush=True)
    sys.stdin.readline()
    usage, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    model = WAYS[way](Path(place), socket)
    loaded = time.perf_counter()
    with torch.inference_mode():
        model(token)
        first = time.perf_counter()
        after = resource.getrusage(resource.RUSAGE_SELF)
        model(token)
        warm = time.perf_counter()
    sample = {
        "first_s": first - start,
        "load_s": loaded - start,
        "warm_s": warm - first,
        "net_s": (first - start) - (warm - first),
        "cpu_s": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
    }
    print(json.dumps(sample), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
