"""The manifest format: a golden file, the layout's properties, and hostile manifests."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.errors import BadCheckpoint
from cache_agent.model import manifest as manifests
from cache_agent.model.checkpoint import describe
from cache_agent.model.manifest import ALIGNMENT, CHUNK, PAGE, Source, SourceFile, WeightFile
from cache_agent.model.safetensors import RawTensor
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire.message import MAX_FDS

MIB = 1 << 20


@pytest.fixture
def small(checkpoint_files):
    """A fixed checkpoint in two shards, as an origin gives it."""
    return FakeOrigin("s3://models/small", checkpoint_files(seed=1, shards=2, layers=2, hidden=8, vocabulary=11))


def lay_out(files: list[list[tuple[str, int]]], **options) -> manifests.Manifest:
    """The manifest of files given as lists of (tensor name, size in bytes)."""
    weights = []
    for number, tensors in enumerate(files):
        position, raw = 0, []
        for name, size in tensors:
            raw.append(RawTensor(name, "U8", (size,), position, size))
            position += size
        weights.append((WeightFile(f"{number}.safetensors", 100 + position, 100), raw))
    return manifests.lay_out("src-test", weights, {"config.json": b"{}"}, **options)


# --- format -----------------------------------------------------------------------------------------------------------


def test_golden(small, golden):
    described = describe(small)
    value = {
        "source": described.source.id,
        "revision": by_hand(small.contents),
        "manifest": json.loads(manifests.encode(described.manifest)),
    }
    golden("agent/manifest.json", value)


def test_encode_and_decode_are_inverse(small):
    described = describe(small).manifest
    assert manifests.decode(manifests.encode(described)) == described
    assert manifests.decode(memoryview(manifests.encode(described))) == described


def by_hand(files: dict[str, bytes]) -> str:
    """The revision as README tells people to compute it: `sha256sum` of each file, no code of ours."""
    lines = [
        f"{name}\0{len(content)}\0{hashlib.sha256(content).hexdigest()}\n"
        for name, content in sorted(files.items())
        if not name.endswith(".index.json")
    ]
    return "rev-" + hashlib.sha256("".join(lines).encode()).hexdigest()[:40]


def test_revision_is_what_sha256_gives_by_hand(small):
    contents = {
        name: (len(data), hashlib.sha256(data).hexdigest())
        for name, data in small.contents.items()
        if not name.endswith(".index.json")
    }
    assert manifests.revision(contents) == by_hand(small.contents)
    assert re.fullmatch(r"rev-[0-9a-f]{40}", manifests.revision(contents))


def test_revision_depends_on_every_byte_name_and_size():
    one = {"a": (1, "00"), "b": (2, "11")}
    others = [
        {"a": (1, "00")},
        {"a": (1, "00"), "c": (2, "11")},
        {"a": (1, "00"), "b": (3, "11")},
        {"a": (1, "00"), "b": (2, "12")},
        {"a": (1, "11"), "b": (2, "00")},
    ]
    seen = {manifests.revision(contents) for contents in [one, *others]}
    assert len(seen) == 1 + len(others)
    assert manifests.revision(dict(reversed(one.items()))) == manifests.revision(one)


def test_source_id_depends_on_uri_names_sizes_and_etags_but_not_on_their_order():
    files = (SourceFile("a", 1, "x"), SourceFile("b", 2, "y"))
    source = Source("s3://b/m", files)
    assert Source("s3://b/m", files[::-1]).id == source.id
    others = [
        Source("s3://b/n", files),
        Source("s3://b/m", files[:1]),
        Source("s3://b/m", (files[0], SourceFile("b", 3, "y"))),
        Source("s3://b/m", (files[0], SourceFile("b", 2, "z"))),
        Source("s3://b/m", (files[0], SourceFile("c", 2, "y"))),
    ]
    assert len({source.id, *(other.id for other in others)}) == 6


# --- layout -----------------------------------------------------------------------------------------------------------

names = st.one_of(
    st.builds("model.layers.{}.mlp.{}".format, st.integers(0, 120), st.sampled_from("abcdef")),
    st.builds("transformer.h.{}.attn.{}".format, st.integers(0, 12), st.sampled_from("abc")),
    st.sampled_from(["model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight", "model.norm.weight"]),
    st.text("xyz.", min_size=1, max_size=6),
)
tensor_sizes = st.one_of(
    st.integers(0, 200),
    st.integers(0, 3 * CHUNK),
    st.sampled_from([0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, PAGE, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK]),
)
checkpoints = st.lists(st.tuples(names, tensor_sizes), min_size=1, max_size=40, unique_by=lambda item: item[0]).flatmap(
    lambda tensors: st.lists(st.integers(0, 3), min_size=len(tensors), max_size=len(tensors)).map(
        lambda owners: [[t for t, owner in zip(tensors, owners, strict=True) if owner == file] for file in range(4)]
    )
)


@given(checkpoints, st.sampled_from([PAGE, 3 * PAGE, 2 * CHUNK + PAGE, manifests.MAX_SEGMENT]))
def test_layout(files, max_segment):
    plan = lay_out(files, max_segment=max_segment)
    given_tensors = {name: (size, number) for number, file in enumerate(files) for name, size in file}
    assert {t.name: (t.size, t.file) for t in plan.tensors} == given_tensors

    assert 1 <= len(plan.segments) < MAX_FDS, "the manifest and every segment are fds of one message"
    assert all(size > 0 and size % PAGE == 0 for size in plan.segments)
    # Models of more than about 100 of the longest segments get longer ones.
    longest = max(max_segment, plan.nbytes // 100 + PAGE)
    position = (0, 0)
    for tensor in plan.tensors:
        assert tensor.offset % ALIGNMENT == 0
        assert tensor.offset + tensor.size <= plan.segments[tensor.segment]
        assert (tensor.segment, tensor.offset) >= position, "tensors overlap, or are not in the order of memory"
        position = (tensor.segment, tensor.offset + tensor.size)
    for number, size in enumerate(plan.segments):
        inside = [t for t in plan.tensors if t.segment == number]
        end = max(t.offset + t.size for t in inside)
        assert size - end < PAGE or end == 0, "no segment is longer than its tensors need"
        assert size <= longest or len([t for t in inside if t.size]) == 1, "only a single large tensor may exceed it"
    assert plan.nbytes == sum(plan.segments)
    assert manifests.decode(manifests.encode(plan)) == plan


@given(checkpoints)
def test_tensors_are_in_the_order_in_which_a_model_runs(files):
    def stage(name: str) -> tuple[int, int]:
        if match := re.search(r"\.(?:layers|h)\.(\d+)\.", name):
            return (1, int(match[1]))
        return (0, 0) if "embed" in name or "wte" in name else (2, 0)

    stages = [stage(tensor.name) for tensor in lay_out(files).tensors]
    assert stages == sorted(stages)


@given(checkpoints, st.sampled_from([PAGE, 2 * CHUNK + PAGE]))
def test_chunks_partition_the_segments(files, max_segment):
    plan = lay_out(files, max_segment=max_segment)
    expected = 0, 0
    for segment, start, end in plan.chunks():
        if expected[0] < segment:
            assert expected[1] == plan.segments[expected[0]]
            expected = expected[0] + 1, 0
        assert (segment, start) == expected
        assert start < end <= start + CHUNK
        expected = segment, end
    assert expected == (len(plan.segments) - 1, plan.segments[-1])


@given(checkpoints, st.sampled_from([PAGE, 2 * CHUNK + PAGE]))
def test_reads_bring_every_tensor_byte_exactly_once_from_its_place(files, max_segment):
    plan = lay_out(files, max_segment=max_segment)
    chunks = list(plan.chunks())
    plans = manifests.reads(plan)
    assert len(plans) == len(chunks)
    spans = []
    for (segment, start, end), reads in zip(chunks, plans, strict=True):
        for read in reads:
            assert read.size > 0
            assert start <= read.offset
            assert read.offset + read.size <= end, "a read never leaves its chunk"
            spans.append((segment, read.offset, read.offset + read.size, read))
    spans.sort(key=lambda span: span[:2])
    for (segment, _, end, _), (next_segment, start, _, _) in itertools.pairwise(spans):
        assert (segment, end) <= (next_segment, start), "two reads write the same bytes"
    assert sum(end - start for _, start, end, _ in spans) == sum(t.size for t in plan.tensors)
    for tensor in plan.tensors:
        covered = 0
        for segment, start, end, read in spans:
            low, high = max(start, tensor.offset), min(end, tensor.offset + tensor.size)
            if segment == tensor.segment and low < high:
                assert read.file == tensor.file
                assert read.file_offset + low - read.offset == tensor.file_offset + low - tensor.offset
                covered += high - low
        assert covered == tensor.size


def test_neighbours_of_one_file_are_read_in_one_go():
    plan = lay_out([[(f"model.layers.0.w{number}", 64 * 1000) for number in range(20)]])
    (reads,) = manifests.reads(plan)
    assert reads == [manifests.Read(file=0, file_offset=100, offset=0, size=20 * 64 * 1000)]


def test_neighbours_in_memory_from_two_files_are_two_reads_even_if_their_offsets_match():
    plan = lay_out([[("model.layers.0.a", 64)], [("lm_head.weight", 64), ("model.layers.1.b", 64)]])
    (reads,) = manifests.reads(plan)
    assert [(read.file, read.file_offset, read.offset) for read in reads] == [(0, 100, 0), (1, 164, 64), (1, 100, 128)]


def test_the_first_two_layers_of_a_large_model_come_before_its_head_on_the_wire():
    sizes = [("lm_head.weight", 40 * MIB), ("model.embed_tokens.weight", 40 * MIB)]
    sizes += [(f"model.layers.{layer}.mlp.w", 30 * MIB) for layer in (10, 2, 0, 1)]
    plan = lay_out([sizes], max_segment=64 * MIB)
    assert [t.name for t in plan.tensors] == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.w",
        "model.layers.1.mlp.w",
        "model.layers.2.mlp.w",
        "model.layers.10.mlp.w",
        "lm_head.weight",
    ]
    assert [t.segment for t in plan.tensors] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("share", [0.3, 0.51, 0.9, 1.0])
def test_a_model_of_many_large_tensors_still_fits_into_one_message(share):
    """Tensors of just over half a segment waste the most: every segment then holds one."""
    size = int(manifests.MAX_SEGMENT * share)
    plan = lay_out([[(f"model.layers.{number}.experts", size) for number in range(600)]])
    assert len(plan.segments) < MAX_FDS


def test_a_tensor_in_two_files_is_refused():
    with pytest.raises(BadCheckpoint, match="tensor 'a' is in two of the weight files"):
        lay_out([[("a", 1)], [("a", 1)]])


def test_a_checkpoint_without_a_tensor_is_refused():
    with pytest.raises(BadCheckpoint, match="holds no tensor"):
        lay_out([[]])


def test_too_many_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(manifests, "MAX_TENSORS", 3)
    with pytest.raises(BadCheckpoint, match="at most 3"):
        lay_out([[(str(number), 1) for number in range(4)]])


# --- hostile manifests ------------------------------------------------------------------------------------------------


@pytest.fixture
def valid(small):
    return json.loads(manifests.encode(describe(small).manifest))


def change_tensor(**fields):
    return lambda value: value["tensors"][0].update(fields)


HOSTILE = {
    "format of the future": lambda v: v.update(format=2),
    "layout of the future": lambda v: v.update(layout=2),
    "format is a string": lambda v: v.update(format="1"),
    "chunk of 0": lambda v: v.update(chunk=0),
    "chunk of 1": lambda v: v.update(chunk=1),
    "negative chunk": lambda v: v.update(chunk=-PAGE),
    "segment of 0": lambda v: v.update(segments=[0]),
    "segment that is no multiple of a page": lambda v: v.update(segments=[PAGE + 1]),
    "negative segment": lambda v: v.update(segments=[-PAGE]),
    "segment of 2^63": lambda v: v.update(segments=[1 << 63]),
    "segment of 2^64": lambda v: v.update(segments=[1 << 64]),
    "no segment": lambda v: v.update(segments=[]),
    "segments missing": lambda v: v.pop("segments"),
    "tensors missing": lambda v: v.pop("tensors"),
    "tensors is an object": lambda v: v.update(tensors={}),
    "files is a list": lambda v: v.update(files=[]),
    "file that is no base64": lambda v: v.update(files={"config.json": "!"}),
    "unknown segment": change_tensor(segment=1),
    "negative segment number": change_tensor(segment=-1),
    "segment number is true": change_tensor(segment=True),
    "offset behind the segment": change_tensor(offset=1 << 40),
    "offset just behind the segment": change_tensor(offset=PAGE),
    "negative offset": change_tensor(offset=-ALIGNMENT),
    "offset that is not aligned": change_tensor(offset=ALIGNMENT - 1),
    "offset that would wrap": change_tensor(offset=(1 << 62) - ALIGNMENT, size=1 << 61),
    "size behind the segment": change_tensor(size=PAGE + 1, shape=[PAGE + 1], dtype="U8"),
    "size of 2^62": change_tensor(size=1 << 62),
    "size that is not the shape's": change_tensor(shape=[1000, 1000]),
    "shape with a negative dimension": change_tensor(shape=[-1, -176]),
    "shape whose product wraps": change_tensor(shape=[1 << 32, 1 << 32], size=0),
    "unknown dtype": change_tensor(dtype="F13"),
    "dtype is a number": change_tensor(dtype=1),
    "name is null": change_tensor(name=None),
    "unknown file": change_tensor(file=2),
    "behind the file's end": change_tensor(file_offset=1 << 40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifest_is_refused(name, valid):
    manifests.decode(json.dumps(valid).encode())
    hostile = copy.deepcopy(valid)
    HOSTILE[name](hostile)
    assert hostile != valid
    with pytest.raises(BadCheckpoint):
        manifests.decode(json.dumps(hostile).encode())


@pytest.mark.parametrize("data", [b"", b"\0", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"source":'])
def test_garbage_is_no_manifest(data):
    with pytest.raises(BadCheckpoint):
        manifests.decode(data)


def test_fields_of_a_newer_agent_are_ignored(valid):
    manifests.decode(json.dumps({**valid, "added_later": {"x": 1}}).encode())


def test_fuzz_changed_bytes(valid, rounds):
    data = json.dumps(valid).encode()
    source = random.Random(11)
    for _ in range(rounds(1500, 200_000)):
        changed = bytearray(data)
        for _ in range(source.randint(1, 3)):
            place = source.randrange(len(changed))
            changed[place : place + source.randint(0, 2)] = source.randbytes(source.randint(0, 2))
        try:
            plan = manifests.decode(bytes(changed))
        except BadCheckpoint:
            continue
        assert all(t.offset + t.size <= plan.segments[t.segment] for t in plan.tensors)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"a": 1} x'])
def test_config_that_is_no_object_is_refused(data):
    with pytest.raises(BadCheckpoint, match=r"config\.json is no JSON object"):
        manifests.model_config({"config.json": data})


def test_config_is_returned_parsed():
    assert manifests.model_config({"config.json": b'{"a": [1]}'}) == {"a": [1]}
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        manifests.model_config({"tokenizer.json": b"{}"})
