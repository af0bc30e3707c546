"""Messages between processes: any text survives packing and unpacking, and nonsense is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.process.messages import KINDS, pack, unpack, whole

numbers = st.integers(-(10**18) + 1, 10**18 - 1)
texts = st.text(
    st.characters(exclude_characters="\0", exclude_categories=[]).filter(lambda c: ord(c) < 0xD800), max_size=20
)
bytes_of_os = st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
words = st.text(st.sampled_from("abc-_./:ü"), min_size=1, max_size=8)
spans = st.lists(st.tuples(words, texts.filter(bool), numbers, numbers), min_size=1, max_size=4)
variables = st.dictionaries(st.sampled_from(["PATH", "fork", "A", "span", "environment"]), bytes_of_os)


@given(
    st.fixed_dictionaries(
        {"cwd": bytes_of_os},
        optional={
            "fork": numbers, "why": texts, "serves": st.floats(allow_nan=False), "spans": spans,
            "environment": variables,
        },
    )
)  # fmt: skip
def test_what_is_packed_is_what_is_read(message: dict[str, Any]) -> None:
    assert unpack(pack(message)) == message


@given(st.binary(max_size=40) | st.lists(st.sampled_from([b"fork=", b"span=", b"1 ", b"a", b"\0"])).map(b"".join))
def test_nonsense_is_refused_or_some_message(data: bytes) -> None:
    try:
        message = unpack(data)
    except ValueError:
        return
    assert unpack(pack(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"a=b", b"a\0", b"a=b\0c\0", b"fork=\0", b"fork=1.0\0", b"fork= 1\0", b"fork=1_0\0", b"fork=+1\0",
        b"fork=" + b"9" * 19 + b"\0", "fork=١\0".encode(), b"serves=fast\0", b"span=1 2 shim\0",
        b"span=1 x shim exec\0", b'{"fork":1}',
    ],
)  # fmt: skip
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  whatever it says: nobody reads it
        unpack(data)


def test_the_first_one_counts_and_spans_add_up() -> None:
    found = unpack(b"a=1\0a=2\0span=1 2 o n\0span=3 4 o more words\0\0X=1\0=Y\0Z\0X=2\0E=\0")
    assert found == {
        "a": "1", "spans": [("o", "n", 1, 2), ("o", "more words", 3, 4)], "environment": {"X": "1", "E": ""},
    }  # fmt: skip


def test_a_nul_in_a_text_ends_nothing() -> None:
    assert unpack(pack({"text": "one\0fork=7", "fork": 1})) == {"text": "one fork=7", "fork": 1}


def test_a_text_that_cannot_be_encoded_is_sent_all_the_same() -> None:
    """The text of an exception of user code may be anything, and has to reach the shim."""
    assert unpack(pack({"text": "a\ud800b", "cwd": "/\udcff"})) == {"text": "a?b", "cwd": "/\udcff"}


def test_numbers_are_numbers() -> None:
    assert [whole(text) for text in ("0", "-1", "007", "9" * 18)] == [0, -1, 7, 10**18 - 1]
    assert unpack(b"serves=0.25\0", KINDS) == {"serves": 0.25}
