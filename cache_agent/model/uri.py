"""The URI of a model: its place, and the revision that it is pinned to. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

from cache_agent.errors import BadModelURI

_PIN = re.compile(r"^(?P<base>.*)@(?P<revision>rev-[0-9a-f]{40})$", re.DOTALL)
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://")


class ModelURI(NamedTuple):
    """A model's URI in parts: `text` without the pin, `scheme`, the `place` behind `scheme://`, `revision` or ""."""

    text: str
    scheme: str
    place: str
    revision: str


def parse_uri(uri: str) -> ModelURI:
    """Split a model's URI. Raises `BadModelURI`, which names the forms that are understood."""
    match = _PIN.match(uri)
    base, revision = (match["base"], match["revision"]) if match else (uri, "")
    if not _SCHEME.match(base) or any(ord(character) < 32 for character in base):
        raise BadModelURI(f"{uri[:200]!r} is no model URI; use s3://bucket/prefix, hf://org/name or file:///directory")
    scheme, place = base.split("://", 1)
    stripped = place.rstrip("/")
    text = f"{scheme}://{stripped}" if stripped else base
    place = unquote(place) if scheme == "file" else place
    if "\0" in place:
        raise BadModelURI(f"{uri[:200]!r} names no directory: there is a NUL in it")
    return ModelURI(text, scheme, place, revision)
