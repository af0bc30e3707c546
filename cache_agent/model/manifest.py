"""The manifest of a revision: its tensors laid out in segments, its small files inline. Pure.

    source    URI, and each file's name, size and ETag as the origin lists them; its digest is the source id
    revision  SHA-256 over the sorted lines "name NUL size NUL sha256(content) LF"; known once all bytes were read
    segment   ┌─ tensor ─┬pad┬─ tensor ─┬pad┬ … ┐  execution order: embedding, layer 0 … n, head
              0          └ every tensor starts at a multiple of ALIGNMENT; the rest is zeros up to a multiple of PAGE
    chunk     CHUNK bytes of a segment: the unit of transfer and checksum

A manifest travels and is stored as JSON; FORMAT and LAYOUT change when an old reader would misread a new manifest.
Tensor bytes are those of the safetensors files, untouched; `file` and `file_offset` name their place there.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from cache_agent.errors import BadCheckpoint
from cache_agent.model.safetensors import ITEM_BYTES, RawTensor

FORMAT = 1
LAYOUT = 1
ALIGNMENT = 64  # below 64 bytes a bf16 product is slower, and torch may round differently
PAGE = 2 << 20  # segments are multiples of a huge page, so that both page kinds have the same layout
CHUNK = 8 << 20
MAX_SEGMENT = 2 << 30
MOST_SEGMENTS = 200  # each segment is an fd of one message, and a message carries at most 250 fds
MAX_TENSORS = 1_000_000
MAX_MANIFEST = 512 << 20

Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class SourceFile(msgspec.Struct, frozen=True):
    """One file as its origin lists it; `size` in bytes, `etag` changes whenever the content does."""

    name: str
    size: Size
    etag: str


class Source(msgspec.Struct, frozen=True):
    """The files of a model as the origin lists them; stands for one revision until a file is overwritten."""

    uri: str
    files: tuple[SourceFile, ...]

    @property
    def id(self) -> str:
        lines = (f"{file.name}\0{file.size}\0{file.etag}\n" for file in sorted(self.files, key=lambda file: file.name))
        return "src-" + hashlib.sha256((self.uri + "\n" + "".join(lines)).encode()).hexdigest()[:40]

    def file(self, name: str) -> SourceFile | None:
        return next((file for file in self.files if file.name == name), None)


class Tensor(msgspec.Struct, frozen=True):
    """A tensor's place: `size` bytes at `offset` of segment number `segment`; `dtype` as safetensors spells it.

    The same bytes stand at `file_offset` of weight file number `file`.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    segment: Size
    offset: Size
    size: Size
    file: Size
    file_offset: Size


class WeightFile(msgspec.Struct, frozen=True):
    """A safetensors file; `header` is the number of bytes before the tensors."""

    name: str
    size: Size
    header: Size


class Manifest(msgspec.Struct, frozen=True):
    """The layout of a model: `segments` and `chunk` are sizes in bytes, `files` the small files' content by name."""

    source: str
    tensors: tuple[Tensor, ...]
    segments: tuple[Size, ...]
    weight_files: tuple[WeightFile, ...]
    files: dict[str, bytes]
    format: int = FORMAT
    layout: int = LAYOUT
    chunk: int = CHUNK

    @property
    def nbytes(self) -> int:
        """The memory that the segments take, in bytes."""
        return sum(self.segments)

    @property
    def chunk_count(self) -> int:
        return sum(-(-size // self.chunk) for size in self.segments)

    def chunk_place(self, number: int) -> tuple[int, int, int] | None:
        """Return (segment, start, end) of a chunk; None where no chunk has this number."""
        return chunk_place(self.segments, self.chunk, number)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (segment, start, end) of every chunk, in execution order."""
        for number, size in enumerate(self.segments):
            for start in range(0, size, self.chunk):
                yield number, start, min(start + self.chunk, size)


_decoder = msgspec.json.Decoder(Manifest)


def chunk_place(segments: Sequence[int], chunk: int, number: int) -> tuple[int, int, int] | None:
    """Return (segment, start, end) of chunk `number`, counted through all segments; None beyond the last."""
    for segment, size in enumerate(segments):
        count = -(-size // chunk)
        if number < count:
            return segment, number * chunk, min((number + 1) * chunk, size)
        number -= count
    return None


class Read(msgspec.Struct, frozen=True):
    """`size` bytes from `file_offset` of weight file number `file`, which belong at `offset` of a segment."""

    file: int
    file_offset: int
    offset: int
    size: int


def lay_out(
    source: str,
    weights: Iterable[tuple[WeightFile, Iterable[RawTensor]]],
    files: Mapping[str, bytes],
    *,
    max_segment: int = MAX_SEGMENT,
) -> Manifest:
    """Return the manifest of a checkpoint whose headers were parsed. Raises `BadCheckpoint` for a tensor named twice.

    Segments end at `max_segment` bytes, or at more where that would take more than MOST_SEGMENTS of them.
    """
    weights = list(weights)
    weight_files = [file for file, _ in weights]
    found = _in_execution_order(weights)
    # Two neighbouring segments together exceed `max_segment`: otherwise the second one's first tensor would be in the
    # first. So twice the mean size of MOST_SEGMENTS segments is enough.
    total = sum(_round_up(raw.size, ALIGNMENT) for _, raw in found)
    max_segment = max(max_segment, 2 * total // MOST_SEGMENTS)
    placed: list[Tensor] = []
    segments: list[int] = []
    used = 0
    for number, raw in found:
        start = _round_up(used, ALIGNMENT)
        if segments and start + raw.size > max_segment and used:
            segments[-1] = _round_up(used, PAGE)
            segments.append(0)
            start = used = 0
        if not segments:
            segments.append(0)
        placed.append(
            Tensor(
                name=raw.name,
                dtype=raw.dtype,
                shape=raw.shape,
                segment=len(segments) - 1,
                offset=start,
                size=raw.size,
                file=number,
                file_offset=weight_files[number].header + raw.start,
            )
        )
        used = start + raw.size
    segments[-1] = max(PAGE, _round_up(used, PAGE))
    return Manifest(
        source=source,
        tensors=tuple(placed),
        segments=tuple(segments),
        weight_files=tuple(weight_files),
        files=dict(files),
    )


def _in_execution_order(weights: Iterable[tuple[WeightFile, Iterable[RawTensor]]]) -> list[tuple[int, RawTensor]]:
    """Return (number of the weight file, tensor) of all tensors in the order in which the model runs.

    Raises `BadCheckpoint` for a tensor named twice, for none, and for too many.
    """
    found: list[tuple[int, RawTensor]] = []
    seen: set[str] = set()
    for number, (file, tensors) in enumerate(weights):
        for raw in tensors:
            if raw.name in seen:
                raise BadCheckpoint(f"tensor '{raw.name}' is in two of the weight files ({file.name} is the second)")
            seen.add(raw.name)
            found.append((number, raw))
    if not found:
        raise BadCheckpoint("the checkpoint holds no tensor")
    if len(found) > MAX_TENSORS:
        raise BadCheckpoint(f"the checkpoint holds {len(found)} tensors; at most {MAX_TENSORS} are supported")
    # Within a stage the order of the file stays: neighbours in the file are read by one request.
    return sorted(found, key=lambda item: (_stage(item[1].name), item[0], item[1].start))


def reads(manifest: Manifest) -> list[list[Read]]:
    """Return the reads of each chunk of `manifest.chunks()`, neighbours joined. Bytes that no read covers are zero."""
    firsts: dict[tuple[int, int], int] = {}
    plan: list[list[Read]] = []
    for number, start, _ in manifest.chunks():
        firsts[number, start] = len(plan)
        plan.append([])
    for tensor in manifest.tensors:
        position, end = tensor.offset, tensor.offset + tensor.size
        while position < end:
            chunk_start = position - position % manifest.chunk
            stop = min(end, chunk_start + manifest.chunk)
            file_offset = tensor.file_offset + position - tensor.offset
            chunk = plan[firsts[tensor.segment, chunk_start]]
            last = chunk[-1] if chunk else None
            if (
                last is not None
                and last.file == tensor.file
                and last.file_offset + last.size == file_offset
                and last.offset + last.size == position
            ):
                chunk[-1] = Read(last.file, last.file_offset, last.offset, last.size + stop - position)
            else:
                chunk.append(Read(tensor.file, file_offset, position, stop - position))
            position = stop
    return plan


def revision(contents: Mapping[str, tuple[int, str]]) -> str:
    """Return the revision of files given as name → (size, SHA-256 in hex); `sha256sum` is enough to recompute one."""
    lines = (f"{name}\0{size}\0{digest}\n" for name, (size, digest) in sorted(contents.items()))
    return "rev-" + hashlib.sha256("".join(lines).encode()).hexdigest()[:40]


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def decode(data: bytes | memoryview) -> Manifest:
    """Read a manifest, and check that every tensor has its shape's size and lies inside its segment and its file.

    Raises `BadCheckpoint` otherwise.
    """
    try:
        manifest = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"not a manifest: {error}") from error
    if (manifest.format, manifest.layout) != (FORMAT, LAYOUT):
        raise BadCheckpoint(
            f"manifest of format {manifest.format}, layout {manifest.layout}; this program reads {FORMAT}, {LAYOUT}: "
            "agent and function are of different versions, update the older one"
        )
    if manifest.chunk < PAGE or any(size == 0 or size % PAGE for size in manifest.segments):
        raise BadCheckpoint("manifest with chunks or segments of an impossible size")
    for tensor in manifest.tensors:
        if (
            tensor.segment >= len(manifest.segments)
            or tensor.offset % ALIGNMENT
            or tensor.offset + tensor.size > manifest.segments[tensor.segment]
            or tensor.file >= len(manifest.weight_files)
            or tensor.file_offset + tensor.size > manifest.weight_files[tensor.file].size
        ):
            raise BadCheckpoint(f"manifest places tensor '{tensor.name}' outside its segment or file")
        if math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, -1) != tensor.size:
            raise BadCheckpoint(f"manifest gives tensor '{tensor.name}' a size that is not that of its dtype and shape")
    return manifest


def model_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return config.json, parsed. Raises `BadCheckpoint` when the file is missing or no JSON object."""
    if "config.json" not in files:
        raise BadCheckpoint("there is no config.json: the URI must name a Hugging Face model directory")
    try:
        config = msgspec.json.decode(files["config.json"], type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"config.json is no JSON object: {error}") from error
    return config


_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d{1,6})\.")
_FIRST = re.compile(r"(?:^|\.)(?:embed|wte|wpe|word_emb|shared|tok_emb|pos_emb)")
_BEFORE, _LAYERS, _AFTER = 0, 1, 2


def _stage(name: str) -> tuple[int, int]:
    """Return (stage, layer) to sort by: embeddings first, then layers by number, then the rest (norm, head)."""
    if match := _LAYER.search(name):
        return _LAYERS, int(match.group(1))
    return (_BEFORE, 0) if _FIRST.search(name) else (_AFTER, 0)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
