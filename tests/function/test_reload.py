"""A handler under development: what is saved is what answers, and what is wrong with it is said."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import flask
import pytest

from runtime.errors import FunctionError
from runtime.function.handler import Context, Event
from runtime.function.reload import Reloading
from runtime.function.testing import toy_model


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before, path, flag = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    place = tmp_path / "function"
    place.mkdir()
    yield place
    sys.path[:], sys.dont_write_bytecode = path, flag
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def following(folder: Path) -> Callable[[], Reloading]:
    return lambda: Reloading(str(folder), "", toy_model(), nullcontext)


def answer(handler: Reloading) -> str:
    with flask.Flask("test").app_context():
        return handler(Event(), Context(toy_model())).get_data(as_text=True)


def test_the_handler_as_it_was_last_saved(folder: Path, following: Callable[[], Reloading]) -> None:
    (folder / "handler.py").write_text("def handle(event, context): return 'one'")
    handler = following()
    assert answer(handler) == "one"
    same = handler.refresh()
    assert handler.refresh() is same, "nothing changed"
    (folder / "handler.py").write_text("def handle(event, context): return 'two'")
    assert answer(handler) == "two"


def test_modules_beside_it_are_followed_and_load_runs_again(folder: Path, following: Callable[[], Reloading]) -> None:
    (folder / "words.py").write_text("WORD = 'a'")
    (folder / "handler.py").write_text(
        "import words\nfrom . import words as own\nsaid = []\n"
        "def load(context): said.append(words.WORD)\n"
        "def handle(event, context): return ' '.join([*said, own.WORD])"
    )
    handler = following()
    assert answer(handler) == "a a"
    (folder / "words.py").write_text("WORD = 'later'")
    assert answer(handler) == "later later"


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("import nonesuch", "handler_import", ["nonesuch", "(at handler.py, line 1)"]),
        ("x = 1\ny = x / 0", "handler_import", ["ZeroDivisionError", "(at handler.py, line 2)"]),
        ("def handle(:", "handler_import", ["SyntaxError", "line 1"]),
        ("handle = 3", "handler_not_found", ["defines no handle"]),
        (None, "handler_not_found", ["has no handler.py"]),
    ],
)
def test_what_is_wrong_is_the_answer_until_it_is_mended(
    source: str | None, code: str, words: list[str], folder: Path, following: Callable[[], Reloading]
) -> None:
    file = folder / "handler.py"
    if source is not None:
        file.write_text(source)
    handler = following()
    for _ in range(2):
        with pytest.raises(FunctionError) as caught:
            answer(handler)
        assert caught.value.code == code
        assert all(word in caught.value.text for word in words), caught.value.text
    file.write_text("def handle(event, context): return 'mended'")
    assert answer(handler) == "mended"


def test_a_change_is_noticed_without_a_request(
    folder: Path,
    following: Callable[[], Reloading],
    eventually: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folder / "handler.py").write_text("def handle(event, context): return 'one'")
    handler = following()
    handler.watch()
    with caplog.at_level(logging.WARNING, "glowplug.reload"):
        (folder / "handler.py").write_text("1 / 0")
        eventually(lambda: "ZeroDivisionError" in caplog.text, what="the log has the error")
        (folder / "handler.py").write_text("def handle(event, context): return 'again'")
        eventually(lambda: "was imported again" in caplog.text, what="the log says that it is well")
