"""The documents, and the commands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "templates/llm-python/README.md",
    "knative/README.md",
    "cache_agent/tiers/README.md",
)


def commands(document: str) -> list[str]:
    """Of the blocks marked `console`, without prompt, continuation and remark."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    found = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    return [" ".join(re.sub(r"\s+#.*$", "", line).split()) for line in found]
