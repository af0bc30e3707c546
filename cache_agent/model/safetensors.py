"""The header of a safetensors file, parsed and checked: hostile files are refused. Pure.

    file := length (8 bytes, little endian) header (JSON, `length` bytes) data
    header := {"name": {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …, "__metadata__": {…}}

Offsets count from the start of `data`; tensors fill `data` without overlap and without a hole. The format's own library
is not used, because it maps or copies the data.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from typing import NamedTuple

from cache_agent.errors import BadCheckpoint

LENGTH = struct.Struct("<Q")
MAX_HEADER = 100 << 20  # the format's own limit
MAX_DIMENSIONS = 32
MAX_NAME = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell halves of a character that no UTF-8 can carry

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}


class RawTensor(NamedTuple):
    """A tensor of one file: `size` bytes at `start`, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def header_length(prefix: bytes, file_size: int, file: str) -> int:
    """Return the length of the JSON header in bytes, from the file's first 8 bytes. Raises `BadCheckpoint`."""
    if file_size < LENGTH.size or len(prefix) < LENGTH.size:
        raise BadCheckpoint(f"{file}: {file_size} bytes are too few for a safetensors file; was the upload cut short?")
    (length,) = LENGTH.unpack_from(prefix)
    if length > MAX_HEADER or length < 2:
        raise BadCheckpoint(
            f"{file}: the header claims {length} bytes, 2 to {MAX_HEADER} are allowed; this is no safetensors file"
        )
    if LENGTH.size + length > file_size:
        raise BadCheckpoint(
            f"{file}: the header claims {length} bytes and the file has {file_size}; was the upload cut short?"
        )
    return int(length)


def parse_header(header: bytes, file_size: int, file: str) -> list[RawTensor]:
    """Return the tensors of a file in the order of their data. Raises `BadCheckpoint` for any invalid entry."""
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise BadCheckpoint(f"{file}: the header is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file}: the header is no valid JSON object: {error}") from error
    if not isinstance(entries, dict):
        raise BadCheckpoint(f"{file}: the header is a JSON {type(entries).__name__}, not an object")
    entries.pop("__metadata__", None)
    tensors = sorted((_tensor(name, entry, file) for name, entry in entries.items()), key=lambda t: (t.start, t.size))
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the one before" if tensor.start < position else f"leaves a hole after byte {position}"
            raise BadCheckpoint(f"{file}: tensor '{tensor.name}' at {tensor.start} {what}")
        position += tensor.size
    data = file_size - LENGTH.size - len(header)
    if position != data:
        raise BadCheckpoint(
            f"{file}: the tensors take {position} bytes and the file has {data} after its header; "
            "was the upload cut short?"
        )
    return tensors


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the name {twice[:80]!r} occurs twice")
    return result


def _tensor(name: str, entry: object, file: str) -> RawTensor:
    if len(name) > MAX_NAME:
        raise BadCheckpoint(f"{file}: a tensor's name has {len(name)} characters; {MAX_NAME} are allowed")
    if _SURROGATE.search(name):
        raise BadCheckpoint(f"{file}: a tensor's name is no valid Unicode: {name[:80]!r}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise BadCheckpoint(f"{file}: tensor '{name}' lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadCheckpoint(
            f"{file}: tensor '{name}' has the unknown dtype {str(dtype)[:40]!r}; known are {', '.join(ITEM_BYTES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise BadCheckpoint(f"{file}: tensor '{name}' has no valid shape: {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise BadCheckpoint(f"{file}: tensor '{name}' has no valid data_offsets: {str(offsets)[:80]}")
    size = ITEM_BYTES[dtype]
    for dimension in shape:
        size *= dimension
    begin, end = offsets
    if end - begin != size:
        raise BadCheckpoint(f"{file}: tensor '{name}' needs {size} bytes and its offsets span {end - begin}")
    return RawTensor(name, dtype, tuple(shape), begin, size)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
