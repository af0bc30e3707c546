"""Hostile and valid safetensors headers: every byte string is either tensors or `BadCheckpoint` with a sentence."""

from __future__ import annotations

import ctypes
import json
import math
import random
import struct
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_agent.errors import BadCheckpoint
from cache_agent.model import safetensors


def framed(header: object, data: bytes = b"") -> bytes:
    """A file of that header (bytes as they are, anything else as JSON) and data."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + data


def parse(file: bytes, size: int | None = None) -> list[safetensors.RawTensor]:
    """Parse a file of these bytes as `checkpoint` does; `size` is the size that the origin claims."""
    size = len(file) if size is None else size
    length = safetensors.header_length(file[:8], size, "m.safetensors")
    return safetensors.parse_header(file[8 : 8 + length], size, "m.safetensors")


def tensor(shape: object, offsets: object, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


HUGE = 1 << 63
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "length 0": (struct.pack("<Q", 0) + b"{}", "claims 0 bytes"),
    "length 1": (struct.pack("<Q", 1) + b"{", "claims 1 bytes"),
    "length of 2^64-1": (b"\xff" * 8 + b"{}", "no safetensors file"),
    "length above the limit": (struct.pack("<Q", safetensors.MAX_HEADER + 1) + b"{}", "no safetensors file"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "cut short"),
    "length with the sign bit": (struct.pack("<Q", HUGE) + b"{}", "no safetensors file"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 30, "cut short"),
    "zip, as torch.save writes it": (b"PK\x03\x04" + b"\x08" * 30, "no safetensors file"),
    "not UTF-8": (framed(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "UTF-16": (framed('{"a": 1}'.encode("utf-16")), "not UTF-8"),
    "not JSON": (framed(b"{'a': 1}"), "no valid JSON"),
    "trailing JSON": (framed(b"{} {}"), "no valid JSON"),
    "JSON cut off": (framed(b'{"a": {"dtype": "U8"'), "no valid JSON"),
    "a list": (framed([]), "not an object"),
    "a number": (framed(b"12"), "not an object"),
    "null": (framed(b"null"), "not an object"),
    "nested too deeply": (framed(nested(200_000)), "no valid JSON"),
    "a number of 5000 digits": (framed(b'{"a": ' + b"9" * 5000 + b"}"), "no valid JSON"),
    "name twice": (
        framed(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12",
        ),
        "occurs twice",
    ),
    "field twice": (
        framed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"dtype":"I8"}}', b"1"),
        "occurs twice",
    ),
    "name with a lone surrogate": (
        framed(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "Unicode",
    ),
    "name twice, with a lone surrogate": (framed(b'{"\\ud800":1,"\\ud800":2}'), "occurs twice"),
    "surrogate without an entry": (framed(b'{"\\udfff": 1}'), "Unicode"),
    "name of a megabyte": (framed({"n" * (1 << 20): tensor([1], [0, 1])}, b"1"), "characters"),
    "entry is a list": (framed({"a": [1]}), "lacks"),
    "entry is null": (framed({"a": None}), "lacks"),
    "no dtype": (framed({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"), "lacks"),
    "no shape": (framed({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"), "lacks"),
    "no offsets": (framed({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "lacks"),
    "unknown dtype": (framed({"a": tensor([1], [0, 1], "F13")}, b"1"), "unknown dtype 'F13'"),
    "dtype in lower case": (framed({"a": tensor([1], [0, 1], "u8")}, b"1"), "unknown dtype"),
    "dtype is a number": (framed({"a": tensor([1], [0, 1], 7)}, b"1"), "unknown dtype"),
    "dtype is a list": (framed({"a": tensor([1], [0, 1], ["U8"])}, b"1"), "unknown dtype"),
    "shape is a string": (framed({"a": tensor("11", [0, 1])}, b"1"), "no valid shape"),
    "shape is an object": (framed({"a": tensor({}, [0, 1])}, b"1"), "no valid shape"),
    "negative dimension": (framed({"a": tensor([-1], [0, 1])}, b"1"), "no valid shape"),
    "two negative dimensions": (framed({"a": tensor([-1, -1], [0, 1])}, b"1"), "no valid shape"),
    "dimension is true": (framed({"a": tensor([True], [0, 1])}, b"1"), "no valid shape"),
    "dimension is 1.0": (framed({"a": tensor([1.0], [0, 1])}, b"1"), "no valid shape"),
    "dimension is NaN": (framed({"a": tensor([math.nan], [0, 1])}, b"1"), "no valid shape"),
    "dimension of 2^63": (framed({"a": tensor([HUGE], [0, HUGE])}), "no valid shape"),
    "shape of 33 dimensions": (framed({"a": tensor([1] * 33, [0, 1])}, b"1"), "no valid shape"),
    "product that wraps at 2^64": (framed({"a": tensor([1 << 32, 1 << 32], [0, 0])}), "needs"),
    "product that wraps to the right size": (framed({"a": tensor([(1 << 61) + 1, 8], [0, 8])}, b"8" * 8), "needs"),
    "size of 2^61 within the limits": (framed({"a": tensor([1 << 61], [0, 1 << 61])}), "cut short"),
    "offsets too many": (framed({"a": tensor([1], [0, 1, 2])}, b"1"), "no valid data_offsets"),
    "offsets too few": (framed({"a": tensor([1], [0])}, b"1"), "no valid data_offsets"),
    "offsets are a string": (framed({"a": tensor([1], "01")}, b"1"), "no valid data_offsets"),
    "offset is false": (framed({"a": tensor([1], [False, 1])}, b"1"), "no valid data_offsets"),
    "negative offset": (framed({"a": tensor([1], [-1, 0])}, b"1"), "no valid data_offsets"),
    "offset of 2^63": (framed({"a": tensor([1], [HUGE, HUGE + 1])}, b"1"), "no valid data_offsets"),
    "offset of 1e400": (
        framed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1e400]}}', b"1"),
        "no valid data_offsets",
    ),
    "offsets backwards": (framed({"a": tensor([1], [1, 0])}, b"1"), "needs 1 bytes"),
    "offsets of another size": (framed({"a": tensor([2], [0, 1])}, b"1"), "needs 2 bytes"),
    "offsets out of range": (framed({"a": tensor([4], [0, 4])}, b"12"), "cut short"),
    "overlap": (framed({"a": tensor([2], [0, 2]), "b": tensor([2], [1, 3])}, b"123"), "overlaps"),
    "same bytes twice": (framed({"a": tensor([2], [0, 2]), "b": tensor([2], [0, 2])}, b"12"), "overlaps"),
    "one inside the other": (framed({"a": tensor([4], [0, 4]), "b": tensor([1], [1, 2])}, b"1234"), "overlaps"),
    "hole between": (framed({"a": tensor([1], [0, 1]), "b": tensor([1], [2, 3])}, b"123"), "hole"),
    "hole in front": (framed({"a": tensor([1], [1, 2])}, b"12"), "hole"),
    "truncated data": (framed({"a": tensor([8], [0, 8])}, b"1234567"), "cut short"),
    "trailing bytes": (framed({"a": tensor([1], [0, 1])}, b"1 and more"), "has 10 after its header"),
    "data without a tensor": (framed({}, b"1"), "has 1 after its header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_with_a_sentence(name):
    file, words = HOSTILE[name]
    with pytest.raises(BadCheckpoint) as caught:
        parse(file)
    text = caught.value.text
    assert words in text
    assert text.startswith("m.safetensors: ")
    assert len(text) < 1000, "an error must not carry the hostile file into logs and frames"
    text.encode()  # it goes over the wire


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_any_depth_of_nesting_in_a_field_is_refused(field):
    """Parsing and printing recurse to different depths: no depth may fall between them."""
    for depth in range(2, 2000, 7):
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} | {field: "@"}
        body = json.dumps({"a": entry}).encode().replace(b'"@"', nested(depth))
        with pytest.raises(BadCheckpoint):
            parse(framed(body, b"1"))


@pytest.mark.timeout(20)
def test_many_names_with_one_twice_take_linear_time():
    names = [f'"{number}":1' for number in range(300_000)]
    with pytest.raises(BadCheckpoint, match="'299999' occurs twice"):
        parse(framed(("{" + ",".join([*names, names[-1]]) + "}").encode()))


def test_an_absurd_size_takes_no_memory():
    file = framed({"a": tensor([1 << 61], [0, 1 << 61])})
    tracemalloc.start()
    try:
        with pytest.raises(BadCheckpoint):
            parse(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_metadata_is_no_tensor_and_whatever_it_says_is_ignored():
    file = framed({"__metadata__": {"format": "pt", "data_offsets": "x"}, "a": tensor([1], [0, 1])}, b"1")
    assert parse(file) == [safetensors.RawTensor("a", "U8", (1,), 0, 1)]


def test_scalars_empty_tensors_and_padding_are_valid():
    header = {"scalar": tensor([], [0, 4], "F32"), "empty": tensor([3, 0], [4, 4], "F32"), "last": tensor([1], [4, 5])}
    found = parse(framed(json.dumps(header).encode() + b"   \n", b"12345"))
    assert [(t.name, t.shape, t.start, t.size) for t in found] == [
        ("scalar", (), 0, 4),
        ("empty", (3, 0), 4, 0),
        ("last", (1,), 4, 1),
    ]


def test_the_order_is_that_of_the_data_not_of_the_header():
    header = {"b": tensor([1], [1, 2]), "c": tensor([1], [2, 3]), "a": tensor([1], [0, 1])}
    assert [t.name for t in parse(framed(header, b"123"))] == ["a", "b", "c"]


def test_names_in_any_script_are_kept():
    header = json.dumps({"Gewichte.ß.重み": tensor([1], [0, 1])}, ensure_ascii=False).encode()
    assert parse(framed(header, b"1"))[0].name == "Gewichte.ß.重み"


# --- fuzz -------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
sizes = st.integers(-2, 9) | st.sampled_from([0, 1 << 31, 1 << 62, (1 << 62) - 1, HUGE, 1 << 64]) | json_values
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(safetensors.ITEM_BYTES)) | json_values,
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
        "extra": json_values,
    },
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]) | st.text(max_size=4), entries, max_size=4)


def check(file: bytes, size: int) -> None:
    try:
        found = parse(file, size)
    except BadCheckpoint as error:
        error.text.encode()
        return
    position = 0
    for item in found:
        assert item.start == position
        assert item.size == math.prod(item.shape) * safetensors.ITEM_BYTES[item.dtype]
        position += item.size
    assert 8 + struct.unpack_from("<Q", file)[0] + position == size


@given(st.binary(max_size=200), st.integers(0, 300))
@example(b"\x02" + b"\0" * 7 + b"{}", 10)
def test_fuzz_any_bytes(file, size):
    check(file, size)


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_fuzz_any_bytes_behind_a_valid_length(header, data):
    check(framed(header, data), 8 + len(header) + len(data))


@given(headers, st.binary(max_size=40))
def test_fuzz_any_json(header, data):
    file = framed(header, data)
    check(file, len(file))


def test_fuzz_flipped_bytes_of_a_valid_file(rounds, safetensors_bytes, random_tensors):
    file = bytearray(safetensors_bytes(random_tensors(layers=1, hidden=4, vocabulary=5)))
    end = 8 + struct.unpack_from("<Q", file)[0]
    source = random.Random(7)
    for _ in range(rounds(2000, 200_000)):
        changed = bytearray(file)
        for _ in range(source.randint(1, 3)):
            changed[source.randrange(end)] = source.randrange(256)
        check(bytes(changed), len(changed))


# --- agreement with the format's own library --------------------------------------------------------------------------

LIBRARY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
valid_tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(LIBRARY_NAMES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


@given(valid_tensors)
def test_agrees_with_the_library_on_files_it_wrote(shapes):
    library = pytest.importorskip("safetensors")
    sizes = {name: math.prod(shape) * safetensors.ITEM_BYTES[dtype] for name, (dtype, shape) in shapes.items()}
    buffers = {name: ctypes.create_string_buffer(random.Random(name).randbytes(size)) for name, size in sizes.items()}
    file = library.serialize(
        {
            name: library.TensorSpec(
                dtype=LIBRARY_NAMES[dtype],
                shape=shape,
                data_ptr=ctypes.addressof(buffers[name]),
                data_len=sizes[name],
            )
            for name, (dtype, shape) in shapes.items()
        },
        None,
    )
    ours = {item.name: item for item in parse(file)}
    assert {name: (item.dtype, list(item.shape)) for name, item in ours.items()} == shapes
    start = 8 + struct.unpack_from("<Q", file)[0]
    for name, item in ours.items():
        content = file[start + item.start : start + item.start + item.size]
        assert content == buffers[name].raw[: sizes[name]]


@pytest.mark.parametrize("name", HOSTILE)
def test_is_at_least_as_strict_as_the_library(name):
    """A file that the library refuses must not pass here, where more is refused: long names, repeated keys."""
    library = pytest.importorskip("safetensors")
    file = HOSTILE[name][0]
    try:
        library.deserialize(file)
    except (library.SafetensorError, ValueError, OverflowError):
        with pytest.raises(BadCheckpoint):
            parse(file)


@given(headers, st.binary(max_size=24))
def test_fuzz_never_accepts_what_the_library_refuses(header, data):
    library = pytest.importorskip("safetensors")
    file = framed(header, data)
    try:
        parse(file)
    except BadCheckpoint:
        return
    if "__metadata__" in header:
        return  # the library also checks the metadata, which nobody reads here
    library.deserialize(file)
