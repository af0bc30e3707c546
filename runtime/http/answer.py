"""Owns an answer in OpenAI's shape: the token streams of its choices, what of them was told, and how that is written.

    Job ──start──► one token stream per choice ──events──► JSON, or server-sent events with the client's place as id

Where the function keeps requests, a streamed answer and one that was asked for with a key are held while they run
(`runtime.handoff`), and `start` goes on with what is kept of them.
"""

from __future__ import annotations

import math
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


class Run:
    """The token streams of a job; owns them from `start` to `close`."""

    def __init__(self, job: Job, wanted: ResumeQuery, ends: float = math.inf) -> None:
        """A run that is not over at `ends`, on time.monotonic, is broken off."""
        self.job = job
        self.ends = ends
        self.id = wanted.id or f"{prefix(job.chat)}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model: Model | None = None
        self.streams: list[TokenStream] = []
        self.said: list[int] = []  # characters of each choice that a stream has sent
        self.told: list[int] = []  # tokens of each choice that these came from
        self.ended: list[bool] = []
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.numbered = False  # whether events have ids, to be resumed at
        self.resumed = wanted.position is not None
        self.usage_told = False
        self._wanted = wanted

    def start(self, model: Model) -> None:
        """Submits every choice, or none, or goes on with what is kept. Raises `BadRequest`, `EngineBusy`, `Moved`,

        `NotResumable`, `RequestGone`, `SnapshotRefused`.
        """
        wanted = self._wanted
        self.numbered = model.sessions is not None
        if wanted.position and model.sessions is None:
            raise NotResumable("this function keeps no requests: set GLOWPLUG_CHECKPOINTS to keep them from now on")
        if wanted.id and model.sessions is not None:
            if (found := resume_request(model.sessions, model, wanted, self._route)) is not None:
                self._adopt(found)
                self.model = model
                return
            if wanted.position:
                raise RequestGone("nothing is kept of this request any more; send it anew, without Last-Event-ID")
        self._submit(model)
        self.model = model

    @property
    def _route(self) -> Route:
        return "chat" if self.job.chat else "completion"

    def _adopt(self, found: ResumedRequest) -> None:
        self.created = found.context.created
        self.streams = list(found.answers)
        self.told, self.said, self.ended = list(found.sent_tokens), list(found.sent_characters), list(found.ended)
        self.prompt_tokens = sum(len(answer.request.prompt) for answer in found.answers[:: self.job.n])
        self.completion_tokens = sum(found.sent_tokens)
        self.usage_told = found.usage_sent

    def _submit(self, model: Model) -> None:
        job, stats = self.job, model.engine.stats()
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
        except BaseException:
            self.close()
            raise
        self.said, self.told, self.ended = [0] * len(requests), [0] * len(requests), [False] * len(requests)
        if model.sessions is not None and (job.stream or self._wanted.id):
            context = AnswerContext(self._route, self.id, self.created, self._wanted.digest, job.include_usage)
            session = model.sessions.open(context, requests)
            each = enumerate(zip(requests, self.streams, strict=True))
            self.streams = [Answer.of(request, stream).keep(session, n) for n, (request, stream) in each]

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def events(self) -> Iterator[tuple[int, TokenEvent] | None]:
        """(choice, event) as they come, and None every quarter of a second.

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
        """Of a choice, or of a piece of it that begins `offset` characters after its beginning."""
        if self.job.parameters.logprobs is None or self.model is None:
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
    """What the ids of this kind of answers begin with."""
    return "chatcmpl" if chat else "cmpl"


def opening(run: Run) -> Iterator[bytes]:
    if run.job.chat and not run.resumed:
        for index in range(len(run.streams)):
            yield event_of(run, [_choice(run, index, {"role": "assistant", "content": ""})])


def chunks(run: Run, index: int, event: TokenEvent) -> Iterator[bytes]:
    if event.text or event.logprobs is not None:
        chances = run.logprobs([event], run.said[index])
        run.said[index] += len(event.text)
        run.told[index] = event.index + (event.token is not None)
        yield event_of(run, [_choice(run, index, {"content": event.text}, chances=chances)])
    if event.finish:
        run.told[index] = max(run.told[index], event.index + (event.token is not None))
        run.ended[index] = True
        yield event_of(run, [_choice(run, index, {}, event.finish)])


def _choice(
    run: Run, index: int, delta: dict[str, str], finish: str | None = None, chances: dict[str, object] | None = None
) -> dict[str, object]:
    said: dict[str, object] = {"delta": delta} if run.job.chat else {"text": delta.get("content", "")}
    return {"index": index, **said, "logprobs": chances, "finish_reason": finish}


def event_of(run: Run, choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    body = frame(run, choices, chunk=True)
    if run.job.include_usage:
        body["usage"] = usage
    place = written(run.id, run.told, run.ended, usage is not None) if run.numbered else None
    return sse.event(msgspec.json.encode(body), id=place)


def frame(run: Run, choices: list[dict[str, object]], *, chunk: bool) -> dict[str, object]:
    assert run.model is not None
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
