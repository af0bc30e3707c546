"""The documents: pages, the tables in them, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("cache_agent", "knative", "runtime", "scripts", "templates", "tests")


def _pages() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob("*.md")


PAGES = sorted(str(path.relative_to(ROOT)) for path in _pages() if not path.is_symlink())
# The change log tells of what was; all other pages, of what is.
DOCUMENTS = [page for page in PAGES if page != "CHANGELOG.md"]


def text(*folders: str) -> str:
    """All pages below these folders, one after the other."""
    return "\n".join((ROOT / page).read_text() for page in PAGES if page.startswith(folders))


def rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the tables whose first column is headed like that, as they stand there."""
    found: list[list[str]] = []
    wanted = False
    for line in text.splitlines():
        if not line.startswith("|"):
            wanted = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if wanted and not cells[0].startswith("---"):
            found.append(cells)
        wanted = wanted or cells[0] == heading
    return found


def plain(cell: str) -> str:
    """A cell without the backticks around it."""
    return re.sub(r"^`([^`]*)`$", r"\1", cell)


def commands(document: str) -> list[str]:
    """Of the blocks marked `console`, without prompt, continuation and remark."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    found = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    return [" ".join(re.sub(r"\s+#.*$", "", line).split()) for line in found]
