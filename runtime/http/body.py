"""Reads a request's body within a limit, whether its length was announced or it comes in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from werkzeug.wsgi import get_input_stream

from runtime.errors import RequestTooLarge

_READ = 64 << 10
_DRAIN = 32 << 20  # bytes of a refused body that are read, so that the client gets to read the refusal


def read_body(environ: Mapping[str, Any], limit: int) -> bytes:
    """Return the whole body, of at most `limit` bytes. Raise `RequestTooLarge`.

    werkzeug's limit will not do: it passes on the beginning of a chunked body that is too large.
    """
    stream, pieces, size = get_input_stream(dict(environ)), [], 0
    while piece := stream.read(_READ):
        size += len(piece)
        if size <= limit:
            pieces.append(piece)
        elif size > limit + _DRAIN:
            break
    if size > limit:
        raise RequestTooLarge(f"the request's body is larger than {limit} bytes; raise GLOWPLUG_MAX_BODY")
    return b"".join(pieces)
