"""Owns an answer in OpenAI's shape: the token streams of its choices, how much of them was sent, and its encoding.

    AnswerRequest ──► Run: one token stream per choice ──events──► JSON, or server-sent events with a position as id

If the function keeps requests (`runtime.resume`), a run opens a session for a streamed answer, and for an answer with
an Idempotency-Key. Asked for such an answer again, a run goes on with what the session has.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import msgspec

from runtime import sse
from runtime.engine.base import GenerationRequest, TokenEvent, TokenStream
from runtime.errors import AnswerTooLong, BadRequest, EngineFailed, Moved, NotResumable, RequestGone
from runtime.function.model import Model
from runtime.protocol.logprobs import logprobs
from runtime.protocol.requests import Job
from runtime.resume.answer import Answer
from runtime.resume.position import written
from runtime.resume.record import AnswerContext, Route
from runtime.resume.resumption import ResumedRequest, ResumeQuery, resume_request

TICK = 0.25  # seconds between two looks at whether the client is still there


class AnswerRequest:
    """A checked request for an answer, complete before the model is there.

    The answer has the id `id` and ends with an error at `ends`, on time.monotonic, if it is not over by then. `created`
    is in Unix time.
    """

    def __init__(self, job: Job, wanted: ResumeQuery, ends: float) -> None:
        self.job = job
        self.wanted = wanted
        self.ends = ends
        self.id = wanted.id or f"{prefix(job.chat)}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    @property
    def route(self) -> Route:
        return "chat" if self.job.chat else "completion"


class Run:
    """The token streams of one answer, until `close`.

    Per choice: `streams`, `sent_characters` and the number of tokens they came from, `sent_tokens`, and whether the
    choice has `ended`. `numbered` events have ids at which a client can resume.
    """

    def __init__(self, query: AnswerRequest, model: Model) -> None:
        """Submit every choice, or none, or go on with what a session has.

        Raises `BadRequest`, `EngineBusy`, `Moved`, `NotResumable`, `RequestGone`, `SnapshotRefused`.
        """
        wanted, sessions = query.wanted, model.sessions
        if wanted.position and sessions is None:
            raise NotResumable("this function keeps no requests: set GLOWPLUG_CHECKPOINTS to keep them from now on")
        self.job, self.id, self.created, self.ends = query.job, query.id, query.created, query.ends
        self.model = model
        self.numbered = sessions is not None
        self.resumed = wanted.position is not None
        self.usage_sent = False
        self.streams: list[TokenStream] = []
        self.prompt_tokens = self.completion_tokens = 0
        if wanted.id and sessions is not None:
            if (found := resume_request(sessions, model, wanted, query.route)) is not None:
                self._resume(found)
                return
            if wanted.position:
                raise RequestGone("nothing is kept of this request any more; send it anew, without Last-Event-ID")
        self._submit(query)

    def _resume(self, found: ResumedRequest) -> None:
        self.created = found.context.created
        self.streams = list(found.answers)
        self.sent_tokens, self.ended = list(found.sent_tokens), list(found.ended)
        self.sent_characters = list(found.sent_characters)
        self.prompt_tokens = sum(len(answer.request.prompt) for answer in found.answers[:: self.job.n])
        self.completion_tokens = sum(found.sent_tokens)
        self.usage_sent = found.usage_sent

    def _submit(self, query: AnswerRequest) -> None:
        """Begin the generations of all choices, or of none."""
        job, model, sessions = self.job, self.model, self.model.sessions
        stats = model.engine.stats()
        if len(job.prompts) * job.n > stats.slots + stats.queue:
            raise BadRequest(
                f"{len(job.prompts)} prompts with n={job.n} are more than this function ever takes at once "
                f"({stats.slots + stats.queue})",
                "n",
            )
        requests: list[GenerationRequest] = []
        for prompt in job.prompts:
            ids = model.encode(**{"messages" if job.chat else "prompt": prompt}, tools=job.tools)  # type: ignore[arg-type]
            self.prompt_tokens += len(ids)
            for parameters in job.choice_parameters():
                requests.append(model.request(ids, parameters, f"{self.id}-{len(requests)}"))
        try:
            for request in requests:
                self.streams.append(model.begin(request))
            if sessions is not None and (job.stream or query.wanted.id):
                context = AnswerContext(query.route, self.id, self.created, query.wanted.digest, job.include_usage)
                session = sessions.open(context, requests)
                each = enumerate(zip(requests, self.streams, strict=True))
                self.streams = [Answer.of(request, stream).keep(session, n) for n, (request, stream) in each]
        except BaseException:
            self.close()
            raise
        count = len(requests)
        self.sent_characters, self.sent_tokens, self.ended = [0] * count, [0] * count, [False] * count

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def events(self) -> Iterator[tuple[int, TokenEvent] | None]:
        """Yield (choice, event) as they come, and None every quarter of a second.

        Raises `AnswerTooLong`, `EngineFailed`, `Moved`.
        """
        live = {index: stream for index, stream in enumerate(self.streams) if not self.ended[index]}
        ticked = time.monotonic()
        while live:
            for index, stream in tuple(live.items()):
                timeout = TICK if len(live) == 1 else 0.01
                while index in live and (event := stream.next(timeout)) is not None:
                    timeout = 0.0
                    if event.finish == "moved":
                        raise Moved(event.error or "this answer goes on at another replica; ask for it again")
                    if event.finish in ("cancelled", "error"):
                        raise EngineFailed(event.error or f"the generation was {event.finish}")
                    self.completion_tokens += event.token is not None
                    if event.finish:
                        del live[index]
                    yield index, event
                now = time.monotonic()
                if live and now > self.ends:
                    raise AnswerTooLong.of_stream()
                if now - ticked >= TICK:
                    yield None
                    ticked = now

    def logprobs(self, events: list[TokenEvent], offset: int = 0) -> dict[str, object] | None:
        """Return OpenAI's `logprobs` of `events`, the first of which begins `offset` characters into its choice; None
        if the request has not asked for them."""
        if self.job.parameters.logprobs is None:
            return None
        return logprobs(self.model.codec, events, chat=self.job.chat, offset=offset)

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def prefix(chat: bool) -> str:
    """Return the beginning of the ids of all such answers."""
    return "chatcmpl" if chat else "cmpl"


def opening(run: Run) -> Iterator[bytes]:
    """Yield the events with which the stream of a chat begins, one per choice."""
    if run.job.chat and not run.resumed:
        for index in range(len(run.streams)):
            yield event_of(run, [_choice(run, index, {"role": "assistant", "content": ""})])


def chunks(run: Run, index: int, event: TokenEvent) -> Iterator[bytes]:
    """Yield the stream's events for `event` of the choice `index`, and count it as sent."""
    if event.text or event.logprobs is not None:
        chances = run.logprobs([event], run.sent_characters[index])
        run.sent_characters[index] += len(event.text)
        run.sent_tokens[index] = event.index + (event.token is not None)
        yield event_of(run, [_choice(run, index, {"content": event.text}, chances=chances)])
    if event.finish:
        run.sent_tokens[index] = max(run.sent_tokens[index], event.index + (event.token is not None))
        run.ended[index] = True
        yield event_of(run, [_choice(run, index, {}, event.finish)])


def _choice(
    run: Run, index: int, delta: dict[str, str], finish: str | None = None, chances: dict[str, object] | None = None
) -> dict[str, object]:
    text: dict[str, object] = {"delta": delta} if run.job.chat else {"text": delta.get("content", "")}
    return {"index": index, **text, "logprobs": chances, "finish_reason": finish}


def event_of(run: Run, choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    """Encode one event of the stream, whose id is the client's position after it if the run is numbered."""
    body = frame(run, choices, chunk=True)
    if run.job.include_usage:
        body["usage"] = usage
    position = written(run.id, run.sent_tokens, run.ended, usage is not None) if run.numbered else None
    return sse.event(msgspec.json.encode(body), id=position)


def frame(run: Run, choices: list[dict[str, object]], *, chunk: bool) -> dict[str, object]:
    """Return the body of an answer, or of a chunk of a streamed one."""
    kind = "text_completion"
    if run.job.chat:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    return {
        "id": run.id,
        "object": kind,
        "created": run.created,
        "model": run.model.name,
        "system_fingerprint": run.model.revision,
        "choices": choices,
    }
