"""Owns the reading of a checkpoint's description: which files are weights, their headers, the small files inline.

`describe` asks an origin for headers and small files; `encode_description` and `decode_description` carry the result to
other nodes and to SSD.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import msgspec

from cache_agent.errors import BadCheckpoint, OriginUnavailable, UnsafeCheckpoint
from cache_agent.model import manifest, safetensors
from cache_agent.model.manifest import Manifest, Source, SourceFile, WeightFile
from cache_agent.model.origin import Origin

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SMALL = (".json", ".jinja", ".txt", ".model")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_SMALL_FILE = 64 << 20
_MAX_SMALL_TOTAL = 256 << 20
_FIRST_READ = 256 << 10  # most headers fit, and one request brings length and header
_PARALLEL = 8
_ATTEMPTS = 3

T = TypeVar("T")
R = TypeVar("R")


class Description(NamedTuple):
    """A checkpoint before its weights are read. `headers` has, by file name, the raw bytes that precede the tensors."""

    source: Source
    manifest: Manifest
    headers: dict[str, bytes]


class _Encoded(msgspec.Struct, frozen=True):
    source: Source
    headers: dict[str, bytes]
    files: dict[str, bytes]


def encode_description(description: Description) -> bytes:
    """Return the description as JSON, without the layout: `decode_description` lays the tensors out again."""
    return msgspec.json.encode(_Encoded(description.source, description.headers, description.manifest.files))


_decoder = msgspec.json.Decoder(_Encoded)


def decode_description(data: bytes) -> Description:
    """Read the JSON that another node or an earlier agent wrote. Raises `BadCheckpoint` unless it is sound."""
    try:
        source, headers, files = msgspec.structs.astuple(_decoder.decode(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"not a description of a checkpoint: {error}") from error
    sizes = {file.name: file.size for file in source.files}
    if not headers or not sizes.keys() >= headers.keys() | files.keys():
        raise BadCheckpoint("a description that names files which its source does not have")
    if any(len(content) != sizes[name] for name, content in files.items()):
        raise BadCheckpoint("a description whose files have other sizes than its source")
    parsed = [_parsed(name, sizes[name], headers[name]) for name in headers]
    manifest.model_config(files)
    return Description(source, manifest.lay_out(source.id, parsed, files), headers)


def _parsed(name: str, size: int, header: bytes) -> tuple[WeightFile, Iterable[safetensors.RawTensor]]:
    """Return a weight file and its tensors, from its size and raw header. Raises `BadCheckpoint`."""
    length = safetensors.LENGTH.size
    if len(header) < length or length + safetensors.header_length(header[:length], size, name) != len(header):
        raise BadCheckpoint(f"{name}: a header that is cut off")
    return WeightFile(name, size, len(header)), safetensors.parse_header(header[length:], size, name)


def describe(origin: Origin) -> Description:
    """Read an origin's headers and small files, and lay the tensors out; no weights are read.

    Raises `BadCheckpoint`, `UnsafeCheckpoint`, or the origin's own error.
    """
    listed = {file.name: file for file in origin.files()}
    weights = _weight_files(origin, listed)
    small = [
        file
        for name, file in sorted(listed.items())
        if name.endswith(_SMALL) and name not in weights and not name.endswith(".index.json")
    ]
    if "config.json" not in listed:
        raise BadCheckpoint(f"{origin.uri} has no config.json: the URI must name a Hugging Face model directory")
    if sum(file.size for file in small) > _MAX_SMALL_TOTAL or any(file.size > _MAX_SMALL_FILE for file in small):
        raise BadCheckpoint(f"{origin.uri}: config and tokenizer files exceed {_MAX_SMALL_TOTAL >> 20} MiB")
    source = Source(origin.uri, tuple(listed[name] for name in sorted({*weights, *(file.name for file in small)})))
    headers = _parallel(lambda name: _header(origin, listed[name]), weights)
    parsed = [_parsed(name, listed[name].size, data) for name, data in zip(weights, headers, strict=True)]
    contents = _parallel(lambda file: _read_patiently(origin, file, 0, file.size), small)
    files = {file.name: data for file, data in zip(small, contents, strict=True)}
    manifest.model_config(files)
    return Description(source, manifest.lay_out(source.id, parsed, files), dict(zip(weights, headers, strict=True)))


def _weight_files(origin: Origin, listed: dict[str, SourceFile]) -> list[str]:
    """Return the names of the safetensors files as transformers chooses them: one file, else the index's shards."""
    if _SINGLE in listed:
        return [_SINGLE]
    if _INDEX not in listed:
        if any(name.endswith(PICKLED) for name in listed):
            raise UnsafeCheckpoint(
                f"{origin.uri} has pickled weights only; reading them would run code. Convert them once: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors"
            )
        raise BadCheckpoint(f"{origin.uri} has neither {_SINGLE} nor {_INDEX}")
    index = listed[_INDEX]
    if index.size > _MAX_SMALL_FILE:
        raise BadCheckpoint(f"{origin.uri}: {_INDEX} has {index.size} bytes; is it an index?")
    try:
        weight_map = msgspec.json.decode(_read_patiently(origin, index, 0, index.size), type=dict[str, Any])[
            "weight_map"
        ]
        shards = sorted(set(msgspec.convert(weight_map, dict[str, str]).values()))
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{origin.uri}: {_INDEX} has no usable weight_map: {error}") from error
    if not shards:
        raise BadCheckpoint(f"{origin.uri}: {_INDEX} names no file")
    for shard in shards:
        if shard not in listed or not shard.endswith(".safetensors"):
            raise BadCheckpoint(f"{origin.uri}: {_INDEX} names {shard[:200]!r}, which is not there; upload the shard")
    return shards


def _header(origin: Origin, file: SourceFile) -> bytes:
    """Read all bytes before the tensors: the length field and the JSON."""
    data = _read_patiently(origin, file, 0, min(file.size, _FIRST_READ))
    end = safetensors.LENGTH.size + safetensors.header_length(data[: safetensors.LENGTH.size], file.size, file.name)
    return data[:end] if end <= len(data) else data + _read_patiently(origin, file, len(data), end - len(data))


def _read_patiently(origin: Origin, file: SourceFile, start: int, size: int) -> bytes:
    """Read `size` bytes from `start` of a file; an origin that does not answer is tried again after a short wait."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return origin.read(file, start, size)
        except OriginUnavailable:
            time.sleep(random.uniform(0, 0.1 * 2**attempt))  # noqa: S311  jitter, not a secret
    return origin.read(file, start, size)


def _parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the results of `work` in the order of `items`."""
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_PARALLEL, len(items)), thread_name_prefix="describe") as pool:
        return list(pool.map(work, items))
