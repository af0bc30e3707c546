"""`glowplug ask`: sends a prompt to a function, streams the answer, and shows the times of start and answer."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from cache_agent.cli.output import json_option, print_json
from runtime.commands.address import url_option
from runtime.resume import client as resuming
from runtime.sse import EventParser, ServerEvent

_LARGEST_ERROR = 4096
_HERE = {"127.0.0.1", "localhost", "::1"}
_OPENING_SECONDS = 1.5  # that `glowplug serve` needs, at most, to open its port


@dataclass
class ReceivedAnswer:
    """An answer as far as it came; times in seconds of the monotonic clock."""

    asked: float
    text: str = ""
    first: float | None = None
    end: float = 0.0
    model: str = ""
    finish_reason: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    start: str = ""
    phases: dict[str, float] = field(default_factory=dict)

    def add(self, piece: str) -> None:
        if piece and self.first is None:
            self.first = time.monotonic()
        self.text += piece


@click.command()
@click.argument("prompt", required=False)
@url_option("http://127.0.0.1:8080", "Where the function is served.")
@click.option("--handler", is_flag=True, help="Send PROMPT as the body of a request to the function's own handler.")
@click.option("--model", help="The model's name, if the function shall insist on it.")
@click.option("--system", help="What the model is told before PROMPT.")
@click.option("--max-tokens", type=int, help="The most tokens of the answer.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, help="Only the likeliest tokens of this probability together.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds for a start, or a piece.")
@click.option("--resume", is_flag=True, help="Ask for the rest when the answer breaks off, or its replica ends.")
@json_option
def ask(
    prompt: str | None, url: str, handler: bool, timeout: float, resume: bool, as_json: bool, **options: Any
) -> None:
    """Ask a function PROMPT, or what stands in the standard input.

    The answer goes to the standard output as it is written; what it took goes to the standard error.
    """
    if prompt in (None, "-"):
        if prompt is None and sys.stdin.isatty():
            raise click.UsageError("there is no PROMPT; name one, or pipe one in")
        prompt = sys.stdin.read()
    assert prompt is not None, "it was read"
    refused = [name for name, value in options.items() if value not in (None, ())]
    if handler and refused:
        raise click.UsageError(f"--{refused[0].replace('_', '-')} is not for a handler, which reads its request itself")
    answer = ReceivedAnswer(time.monotonic())
    stream = _stream_resuming if resume else _stream
    for piece in stream(answer, url, handler, prompt, timeout, options):
        if not as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    answer.end = time.monotonic()
    if as_json:
        print_json(_figures(answer))
    else:
        click.echo()
        click.echo(_line(answer), err=True)


def _stream(
    answer: ReceivedAnswer, url: str, handler: bool, prompt: str, timeout: float, options: dict[str, Any]
) -> Iterator[str]:
    """Send the request; yield the answer's pieces. Raises `ClickException`."""
    path, body, headers = _request(handler, prompt, options)
    try:
        response = _send(url, path, body, headers, timeout)
        answer.start = response.getheader("X-Glowplug-Start", "")
        answer.phases = phases(response.getheader("Server-Timing", ""))
        if not response.getheader("Content-Type", "").startswith("text/event-stream"):
            piece = response.read().decode("utf-8", "replace")
            answer.add(piece)
            yield piece
            return
        parser, done = EventParser(), False
        while data := response.read1(65536):
            for event in parser.feed(data):
                done = done or event.data == "[DONE]"
                piece = "" if done else _event_text(answer, handler, event)
                answer.add(piece)
                yield piece
        if not done:
            raise click.ClickException("the answer broke off before its end; the function's log may say why")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise click.ClickException(f"{url} stopped answering: {error or type(error).__name__}") from error


def _stream_resuming(
    answer: ReceivedAnswer, url: str, handler: bool, prompt: str, timeout: float, options: dict[str, Any]
) -> Iterator[str]:
    """Like `_stream`, over as many connections as are needed."""
    path, body, headers = _request(handler, prompt, options)
    try:
        for event in resuming.ask([url], path, body, headers=headers, patience=timeout, silence=timeout):
            piece = _event_text(answer, handler, event)
            answer.add(piece)
            yield piece
    except resuming.AskFailed as error:
        raise click.ClickException(f"{error.text} [{error.code}]" if error.code else error.text) from error


def _request(handler: bool, prompt: str, options: dict[str, Any]) -> tuple[str, bytes, dict[str, str]]:
    """Return path, body and headers of the request."""
    headers = {"Accept": "text/event-stream"}
    if handler:
        return "/", prompt.encode(), headers | {"Content-Type": "text/plain"}
    body = json.dumps(_chat_body(prompt, options)).encode()
    return "/v1/chat/completions", body, headers | {"Content-Type": "application/json"}


def _event_text(answer: ReceivedAnswer, handler: bool, event: ServerEvent) -> str:
    return event.data if handler and event.event != "error" else _chat_text(answer, event.data)


def _chat_body(prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    system = options.pop("system")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    asked = {name: value for name, value in options.items() if value not in (None, ())}
    return {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, **asked}


def _send(url: str, path: str, body: bytes, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    """Send a request, again while the function is starting, and return the response. Raises `ClickException`."""
    deadline = time.monotonic() + timeout
    opening = time.monotonic() + _OPENING_SECONDS
    while True:
        connection, base = resuming.connection(url, timeout)
        try:
            connection.connect()
        except OSError as error:
            if isinstance(error, ConnectionRefusedError) and connection.host in _HERE and time.monotonic() < opening:
                time.sleep(0.05)  # `glowplug serve` may have been called just before
                continue
            raise click.ClickException(
                f"nobody answers at {url} ({error}); start a function with glowplug serve FOLDER --model URI, or say "
                "with --url where one is"
            ) from error
        connection.request("POST", base + path, body, headers)
        response = connection.getresponse()
        if response.status < 300:
            return response
        text = response.read(_LARGEST_ERROR).decode("utf-8", "replace")
        retry = response.getheader("Retry-After", "")
        if response.status != 503 or not retry.isdecimal() or time.monotonic() + int(retry) > deadline:
            raise click.ClickException(_refusal(url, response.status, text))
        connection.close()
        time.sleep(int(retry))


def _refusal(url: str, status: int, text: str) -> str:
    """Return the message of an error's body, in OpenAI's shape or in any other."""
    try:
        error = json.loads(text)["error"]
        return f"{error['message']} [{error['code']}]"
    except (ValueError, TypeError, KeyError):
        first = text.strip().partition("\n")[0][:200]
        return f"{url} answered {status}{f': {first}' if first else ''}; is a function of glowplug's served there?"


def _chat_text(answer: ReceivedAnswer, data: str) -> str:
    """Return the text of one event of a chat's stream, and note the rest in `answer`."""
    try:
        event = json.loads(data)
        assert isinstance(event, dict)
    except (ValueError, AssertionError):
        raise click.ClickException(
            "the answer is no chat of OpenAI's protocol; if the function's own handler is meant, ask with --handler"
        ) from None
    if error := event.get("error"):
        raise click.ClickException(f"{error.get('message')} [{error.get('code')}]")
    answer.model = event.get("model") or answer.model
    if usage := event.get("usage"):
        answer.tokens, answer.prompt_tokens = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
    text = ""
    for choice in event.get("choices", ()):
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        text += choice.get("delta", {}).get("content") or ""
    return text


def phases(header: str) -> dict[str, float]:
    """Return milliseconds by phase, from a Server-Timing header."""
    found: dict[str, float] = {}
    for entry in header.split(","):
        name, _, value = entry.strip().partition(";dur=")
        try:
            found[name] = found.get(name, 0.0) + float(value)
        except ValueError:
            continue
    return found


def _figures(answer: ReceivedAnswer) -> dict[str, Any]:
    first = None if answer.first is None else round((answer.first - answer.asked) * 1e3, 1)
    return {
        "text": answer.text,
        "model": answer.model,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "first_text_ms": first,
        "total_ms": round((answer.end - answer.asked) * 1e3, 1),
        "start": answer.start,
        "phases_ms": answer.phases,
    }


def _line(answer: ReceivedAnswer) -> str:
    """Return the times of an answer, in one line."""
    total = answer.end - answer.asked
    parts = []
    if answer.first is not None:
        parts.append(f"first text after {_seconds(answer.first - answer.asked)}")
    if answer.tokens:
        writing = max(answer.end - (answer.first or answer.asked), 1e-9)
        rate = f" ({(answer.tokens - 1) / writing:.0f} tokens/s)" if answer.tokens > 1 else ""
        parts.append(f"{answer.tokens} tokens in {_seconds(total)}{rate}")
    else:
        parts.append(f"all of it after {_seconds(total)}")
    if answer.start:
        longest = sorted(answer.phases.items(), key=lambda phase: -phase[1])[:3]
        named = ", ".join(f"{name} {_seconds(ms / 1e3)}" for name, ms in longest)
        parts.append(f"{answer.start} start{f': {named}' if named else ''}")
    return " · ".join(parts)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
