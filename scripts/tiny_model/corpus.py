"""The training corpus of the demo's model: the project's prose, and questions with their answers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = Path(__file__).with_name("questions.txt")

_PAGES = ("README.md", "CONTRIBUTING.md", "templates/llm-python/README.md", "knative/README.md")
_PACKAGES = ("cache_agent", "runtime")
_FOLDERS = (*_PACKAGES, "scripts", "tests")
"""Folders whose pages are part of the project's prose."""

_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HTML = re.compile(r"<!--.*?-->|<[^>]+>", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_DECORATION = re.compile(r"^\s*(#+|[-*>]|\d+\.)\s+|[*`]")
# A line that draws something: a table's row, a diagram, an indented example.
_DRAWING = re.compile(r"^\s*\||[─-╿▲►▼◄]|^ {4,}\S|--+>")


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer, with several questions that ask for it."""

    questions: tuple[str, ...]
    answer: str


def entries(file: Path = QUESTIONS) -> list[Entry]:
    """Parse the questions: blocks of `Q:` lines with one `A:` line, apart by empty lines; `#` lines are comments.

    Raises ValueError for a block without a question or with more or less than one answer.
    """
    found: list[Entry] = []
    for block in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if not lines:
            continue
        questions = tuple(line[2:].strip() for line in lines if line.startswith("Q:"))
        answers = [line[2:].strip() for line in lines if line.startswith("A:")]
        if not questions or len(answers) != 1 or len(questions) + 1 != len(lines):
            raise ValueError(f"{file}: one A: line and one or more Q: lines make a block, not {block!r}")
        found.append(Entry(questions, answers[0]))
    return found


def paragraphs(repository: Path) -> list[str]:
    """Return the prose of the project's pages and docstrings, without code, tables and drawings."""
    return [paragraph for text in _sources(repository) for paragraph in _prose(text)]


def _sources(repository: Path) -> Iterator[str]:
    beside = [path for folder in _FOLDERS for path in sorted((repository / folder).rglob("README.md"))]
    for page in (*(repository / page for page in _PAGES), *beside):
        if page.is_file():
            yield page.read_text(encoding="utf-8")
    for package in _PACKAGES:
        for file in sorted((repository / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield ast.get_docstring(node) or ""


def _prose(markdown: str) -> Iterator[str]:
    text = _LINK.sub(r"\1", _HTML.sub("", _CODE_BLOCK.sub("", markdown)))
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [_DECORATION.sub("", line).strip() for line in paragraph.splitlines() if not _DRAWING.search(line)]
        joined = " ".join(line for line in lines if line)
        # Shorter ones are headings and labels, which teach no sentence.
        if len(joined) >= 40:
            yield joined
