"""Ranges cover every byte of every tensor once, in pieces that stay inside chunks."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cache_agent.model import manifest, ranges
from cache_agent.model.manifest import CHUNK, WeightFile
from cache_agent.model.safetensors import RawTensor


def laid_out(sizes, files=1, max_segment=64 << 20):
    """Tensors of so many bytes, dealt out to files in turn."""
    weights = []
    for number in range(files):
        position, tensors = 0, []
        for index, size in list(enumerate(sizes))[number::files]:
            tensors.append(RawTensor(f"layers.{index}.w", "U8", (size,), position, size))
            position += size
        if tensors:
            weights.append((WeightFile(f"{number}.safetensors", position + 10, 10), tensors))
    return manifest.lay_out("src-x", weights, {}, max_segment=max_segment)


@given(
    sizes=st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=12),
    files=st.integers(1, 3),
    target=st.sampled_from([1, 1 << 20, CHUNK, 16 << 20, 1 << 40]),
)
def test_every_byte_once_and_in_its_place(sizes, files, target):
    plan = laid_out(sizes, files)
    chunks = list(plan.chunks())
    expected = {(t.file, t.file_offset): t for t in plan.tensors}
    got: dict[tuple[int, int, int], int] = {}
    for wanted in ranges.plan(plan, target):
        assert wanted.size == sum(piece.size for piece in wanted.pieces)
        position = wanted.start
        for piece in wanted.pieces:
            segment, start, end = chunks[piece.chunk]
            assert segment == piece.segment
            assert start <= piece.offset < piece.offset + piece.size <= end
            owner = max(key for key in expected if key[0] == wanted.file and key[1] <= position)
            got[wanted.file, position, piece.size] = piece.offset
            if expected[owner].file_offset + expected[owner].size >= position + piece.size:
                assert piece.offset - expected[owner].offset == position - owner[1]
            position += piece.size
    assert sum(size for _, _, size in got) == sum(sizes)
    spans = sorted((file, start, start + size) for file, start, size in got)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))


def test_large_tensors_become_requests_of_the_size_that_stores_like():
    plan = laid_out([40 << 20] * 8, max_segment=1 << 30)
    sizes = [wanted.size for wanted in ranges.plan(plan)]
    assert max(sizes) <= ranges.LARGEST + CHUNK
    assert sum(sizes) / len(sizes) >= ranges.LARGEST / 2


def test_small_tensors_with_padding_between_them_are_one_request():
    plan = laid_out([100] * 1000)
    (wanted,) = ranges.plan(plan)
    assert (wanted.start, wanted.size, len(wanted.pieces)) == (10, 100_000, 1000)


def test_a_small_model_is_still_read_by_several():
    assert len(ranges.plan(laid_out([CHUNK] * 4))) == 4


@given(done=st.integers(0, 1000))
def test_what_is_left_after_some_bytes(done):
    (wanted,) = ranges.plan(laid_out([100] * 10))
    left = wanted.after(done)
    assert sum(piece.size for piece in left) == 1000 - done
    if left:
        assert left[-1].offset + left[-1].size == wanted.pieces[-1].offset + wanted.pieces[-1].size
