"""A client that loses nothing: it reads an event stream and, when the stream breaks off, asks for the rest.

    for event in ask(["http://127.0.0.1:8080"], "/v1/chat/completions", {"messages": […], "stream": True}):
        print(event.data)

The first request carries a random `Idempotency-Key`: a repetition after a break before the first event is not answered
twice. Later requests carry `Last-Event-ID`. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from runtime.sse import EventParser, ServerEvent

_PAUSES = (0.05, 2.0)  # seconds between attempts: first, and at most
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # statuses of conditions that pass
# Errors inside a stream after which another replica, or a later attempt, has the rest.
RESUMABLE = {"moved", "engine_failed", "busy", "starting", "weights_unavailable", "internal"}


class AskFailed(Exception):
    """A request was refused, or could not be resumed; `status` is 0 where no answer came."""

    def __init__(self, text: str, status: int = 0, code: str = "") -> None:
        super().__init__(text)
        self.text, self.status, self.code = text, status, code


def ask(
    urls: Sequence[str],
    path: str,
    body: object,
    *,
    headers: Mapping[str, str] | None = None,
    patience: float = 60.0,
    silence: float = 30.0,
) -> Iterator[ServerEvent]:
    """Yield the events of one answer, each once, without the final `[DONE]`.

    `urls` are replicas or routes of the same function; a failed connection is followed by the next one. `patience`
    bounds the seconds without an event over all attempts, `silence` those of one connection. Raises `AskFailed`.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fixed = {"Content-Type": "application/json", "Accept": "text/event-stream", **(headers or {})}
    fixed.setdefault("Idempotency-Key", secrets.token_hex(16))
    last, seen, attempt = "", False, 0
    pause, deadline = _PAUSES[0], time.monotonic() + patience
    while True:
        wanted = {**fixed, "Last-Event-ID": last} if last else fixed
        try:
            for event in _events(urls[attempt % len(urls)], path, data, wanted, silence):
                if event.data == "[DONE]":
                    return
                _check(event)
                yield event
                seen, last = True, event.id or last
                pause, deadline = _PAUSES[0], time.monotonic() + patience
            raise AskFailed("the answer broke off")
        except (OSError, http.client.HTTPException) as error:
            failure = AskFailed(f"{urls[attempt % len(urls)]}: {error or type(error).__name__}")
        except AskFailed as error:
            if error.status not in _AGAIN | {0} or (error.code and error.code not in RESUMABLE):
                raise
            failure = error
        if seen and not last:
            raise AskFailed(f"{failure.text}; its events had no ids, so the rest cannot be asked for", 0, failure.code)
        if time.monotonic() + pause >= deadline:
            raise failure
        time.sleep(pause)
        attempt, pause = attempt + 1, min(_PAUSES[1], 2 * pause)


def connection(url: str, seconds: float) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to a function, not opened yet, and the path that the function's routes begin with.

    `url` may leave `http://` out. `seconds` bounds connecting and every read. Raises `ValueError`.
    """
    place = urlsplit(url if "://" in url else f"http://{url}")
    if place.scheme not in ("http", "https") or not place.hostname:
        raise ValueError(f"{url!r} is no function's URL; use http://HOST:PORT, or http://GATEWAY/function/NAME")
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    return kind(place.hostname, place.port, timeout=seconds), place.path.rstrip("/")


def _events(url: str, path: str, body: bytes, headers: Mapping[str, str], silence: float) -> Iterator[ServerEvent]:
    asked, base = connection(url, silence)
    try:
        asked.request("POST", base + path, body, dict(headers))
        response = asked.getresponse()
        if response.status != 200:
            raise _refusal(response.status, response.read())
        if not response.getheader("Content-Type", "").startswith("text/event-stream"):
            raise AskFailed(f"{url} answered all at once, which cannot be gone on with", 200, "no_stream")
        parser = EventParser()
        while chunk := response.read1(65536):
            yield from parser.feed(chunk)
    finally:
        asked.close()


def _check(event: ServerEvent) -> None:
    """Raise `AskFailed` for an event that reports an error."""
    if event.event != "error" and '"error"' not in event.data[:12]:
        return
    raise _refusal(0, event.data.encode())


def _refusal(status: int, body: bytes) -> AskFailed:
    try:
        error = json.loads(body)["error"]
        return AskFailed(str(error["message"]), status, str(error["code"]))
    except (ValueError, KeyError, TypeError):
        return AskFailed(f"status {status}: {body[:200].decode(errors='replace')}", status)
