"""The root of all messages, and the bounds of their fields. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

TEXT_LIMIT = 4096
MAX_FDS = 250  # the kernel's SCM_MAX_FD is 253

Short = Annotated[str, msgspec.Meta(max_length=256)]
Uri = Annotated[str, msgspec.Meta(max_length=2048)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_LIMIT)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Body = Annotated[int, msgspec.Meta(ge=1, le=1 << 26)]  # bytes that follow a frame, on TCP
Digest = Annotated[str, msgspec.Meta(max_length=32)]


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=False):
    """Root of all messages; a class's tag is the "type" in its JSON."""


def tag_of(kind: type[Message]) -> str:
    """Return the "type" that the messages of this class have on the wire."""
    return str(kind.__struct_config__.tag)
