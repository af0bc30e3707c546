"""Event streams: what is written is what is read, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.sse import DONE, KEEP_ALIVE, EventParser, ServerEvent, event

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

one_line = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=20)


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def parse(chunks: list[bytes]) -> list[ServerEvent]:
    parser = EventParser()
    return [found for chunk in chunks for found in parser.feed(chunk)]


class TestRoundTrip:
    @given(
        st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=40), one_line, one_line), max_size=5),
        st.data(),
    )
    def test_any_cut(self, events: list[tuple[str, str, str]], draw: st.DataObject) -> None:
        raw = b"".join(event(data, name, kind) + b": x\n: y\n\n" + KEEP_ALIVE for data, name, kind in events)
        want = [
            ServerEvent(data.replace("\r\n", "\n").replace("\r", "\n"), name, kind or "message")
            for data, name, kind in events
        ]
        assert parse(draw.draw(cuts(raw))) == want

    @given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b":", b"data", b"id", b" ", b"\xff", b"x"]), max_size=30))
    def test_garbage_is_cut_independent(self, pieces: list[bytes]) -> None:
        assert parse(pieces) == parse([b"".join(pieces)])

    def test_text_and_bytes_are_one(self) -> None:
        assert event("é\nb") == event("é\nb".encode()) == "data: é\ndata: b\n\n".encode()
        assert event(b'{"a":1}') == b'data: {"a":1}\n\n'


class TestParser:
    def test_the_standard(self) -> None:
        raw = b"\xef\xbb\xbfdata: a\r\ndata:b\rid: 7\n\nevent: e\ndata\n\n: nothing\n\nid\ndata:  c\n\n" + DONE
        assert parse([raw]) == [
            ServerEvent("a\nb", "7"),
            ServerEvent("", "7", "e"),
            ServerEvent(" c", ""),
            ServerEvent("[DONE]", ""),
        ]

    def test_an_event_cut_off_is_none(self) -> None:
        assert parse([b"data: x\n"]) == []

    def test_lines_are_bounded(self) -> None:
        parser = EventParser()
        parser.feed(b"x" * (1 << 20))
        with pytest.raises(ValueError, match="longer"):
            parser.feed(b"x")


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
def test_ids_are_one_line(bad: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        event("x", id=bad)
