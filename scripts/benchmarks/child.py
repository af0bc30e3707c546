"""A load in a fresh process: it imports, waits for a line from its parent, loads, and runs one token.

It prints one line of JSON: `first_s` from the parent's line until the first forward is done, `load_s` until the model
is there, `warm_s` of a second forward, `net_s` without it, `cpu_s`. Peers are called as their own documentation shows.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

Job: TypeAlias = dict[str, str]

PROMPT = [[1]]  # one token, to measure little but loading
_ATTACHES = 10  # one attach takes a few milliseconds, which is noise
_keep: list[Any] = []  # objects that must live as long as the model


# --- from a directory: {"place": …, "tensors": tensorizer's file} -----------------------------------------------------


def from_pretrained(job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(job["place"], dtype="auto")


def mmap_assign(job: Job) -> Any:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(job):
        tensors |= load_file(file)
    return _assigned(job, tensors)


def runai(job: Job) -> Any:
    return _assigned(job, _streamed(_weight_files(job)))


def fastsafetensors(job: Job) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: _weight_files(job)})
    buffer = loader.copy_files_to_device()
    _keep.extend((loader, buffer))
    return _assigned(job, {name: buffer.get_tensor(name) for name in loader.get_keys()})


def tensorizer(job: Job) -> Any:
    from tensorizer import TensorDeserializer
    from tensorizer.utils import no_init_or_tensor

    with no_init_or_tensor():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["place"]), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    deserializer = TensorDeserializer(job["tensors"], device="cpu")
    deserializer.load_into_module(model)
    _keep.append(deserializer)
    return model


# --- from the agent: {"socket": …, "uri": …} --------------------------------------------------------------------------


def glowplug(job: Job) -> Any:
    """Load as a worker does: the model is put together while its bytes arrive."""
    from cache_agent.client.cache_client import CacheClient
    from runtime.worker import weights

    lease = CacheClient(job["socket"]).lease(job["uri"])
    model = weights.assemble_model(weights.Weights(lease))
    lease.wait_ready(time.monotonic() + 300)
    _keep.append(lease)
    return model


def attach(job: Job) -> None:
    """Lease, map, and make a view of every tensor, without a model."""
    from cache_agent.client.cache_client import CacheClient
    from runtime.worker.weights import Weights

    lease = CacheClient(job["socket"]).lease(job["uri"])
    lease.wait_ready(time.monotonic() + 300)
    _keep.append((lease, Weights(lease)))


# --- from S3: {"endpoint": …, "bucket": …, "prefix": …, "place": an empty directory} ----------------------------------


def download_then_load(job: Job) -> Any:
    """Download every file at once with boto3's own parallel transfers, then from_pretrained."""
    import boto3

    client = boto3.client("s3", endpoint_url=job["endpoint"])
    listed = client.list_objects_v2(Bucket=job["bucket"], Prefix=job["prefix"] + "/")["Contents"]
    with ThreadPoolExecutor(len(listed)) as pool:
        list(
            pool.map(
                lambda item: client.download_file(
                    job["bucket"], item["Key"], str(Path(job["place"]) / Path(item["Key"]).name)
                ),
                listed,
            )
        )
    return from_pretrained(job)


def runai_s3(job: Job) -> Any:
    """Read the weights from S3 with the streamer; the small files come from the directory of {"config": …}."""
    keys = [
        f"s3://{job['bucket']}/{job['prefix']}/{Path(file).name}" for file in _weight_files({"place": job["config"]})
    ]
    return _assigned({"place": job["config"]}, _streamed(keys))


# --- shared -----------------------------------------------------------------------------------------------------------


def _weight_files(job: Job) -> list[str]:
    return [str(file) for file in sorted(Path(job["place"]).glob("*.safetensors"))]


def _streamed(files: list[str]) -> dict[str, torch.Tensor]:
    from runai_model_streamer import SafetensorsStreamer

    tensors = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        for name, tensor in streamer.get_tensors():
            tensors[name] = tensor.clone()  # the streamer reuses the tensor's buffer
    return tensors


def _assigned(job: Job, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a model of the meta device with these tensors assigned, and its computed buffers made anew."""
    config = AutoConfig.from_pretrained(job["place"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


WAYS: dict[str, Callable[[Job], Any]] = {
    way.__name__: way
    for way in (
        from_pretrained,
        mmap_assign,
        runai,
        fastsafetensors,
        tensorizer,
        glowplug,
        attach,
        download_then_load,
        runai_s3,
    )
}
_IMPORTS = {
    "runai": ["runai_model_streamer"],
    "runai_s3": ["runai_model_streamer"],
    "fastsafetensors": ["fastsafetensors"],
    "tensorizer": ["tensorizer"],
    "glowplug": ["runtime.worker.weights"],
    "attach": ["runtime.worker.weights"],
    "download_then_load": ["boto3"],
}


def main(way: str, encoded: str) -> None:
    job: Job = json.loads(encoded)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(int(job["threads"]))
    # All imports come first, the classes of this architecture and torch's kernels included.
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("safetensors.torch")
    for module in _IMPORTS.get(way, []):
        importlib.import_module(module)
    _first_kernels()
    print("ready", flush=True)
    sys.stdin.readline()
    before, start = _cpu_seconds(), time.perf_counter()
    model = WAYS[way](job)
    loaded = time.perf_counter()
    sample = {"load_s": loaded - start, "cpu_s": _cpu_seconds() - before}
    if way == "attach":
        sample["load_s"] = statistics.median([sample["load_s"], *(_seconds(attach, job) for _ in range(_ATTACHES))])
    if model is not None:
        token = torch.tensor(PROMPT)
        with torch.inference_mode():
            model(token)
            first = time.perf_counter()
            sample["cpu_s"] = _cpu_seconds() - before
            model(token)
            warm = time.perf_counter()
        sample |= {"first_s": first - start, "warm_s": warm - first, "net_s": (first - start) - (warm - first)}
    print(json.dumps(sample), flush=True)
    # Threads of a peer must not keep the process alive after its line of output.
    os._exit(0)


def _seconds(work: Callable[[Job], Any], job: Job) -> float:
    start = time.perf_counter()
    work(job)
    return time.perf_counter() - start


def _first_kernels() -> None:
    """Multiply once: a process's first product sets up the kernels, some milliseconds that are no part of loading."""
    with torch.inference_mode():
        torch.nn.functional.linear(torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(*sys.argv[1:])
