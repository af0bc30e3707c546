"""Errors of a function: each has an exit code, a stable code, a sentence, and what to do next.

A class with an HTTP status can be the answer to a request; one without it ends the process with its exit code.
"""

from __future__ import annotations

from typing import ClassVar


class FunctionError(Exception):
    """Root of everything that goes wrong inside a function's own processes."""

    code: ClassVar[str] = "function"
    exit_code: ClassVar[int] = 70
    status: ClassVar[int] = 500

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class BadConfig(FunctionError):
    """A setting is missing or has no sense."""

    code = "bad_config"
    exit_code = 64


class HandlerNotFound(FunctionError):
    """The function's folder has no handler.py, or it has no `handle`."""

    code = "handler_not_found"
    exit_code = 65


class HandlerImportFailed(FunctionError):
    """The function's handler.py raised while it was imported, or its `load` did."""

    code = "handler_import"
    exit_code = 66


class HandlerFailed(FunctionError):
    """`handle` raised while it answered a request."""

    code = "handler_raised"
    status = 500


class BadHandlerResult(FunctionError):
    """`handle` returned something that is no answer."""

    code = "handler_result"
    status = 500


class SharedWeightsError(FunctionError):
    """Code tried to write into weights that other functions of the node use, too."""

    code = "shared_weights"
    status = 500


class ModelUnusable(FunctionError):
    """The weights arrived, and transformers cannot make this model of them."""

    code = "model_unusable"
    exit_code = 67


class WeightsUnavailable(FunctionError):
    """The agent cannot provide the model; the text is the agent's."""

    code = "weights_unavailable"
    exit_code = 68
    status = 503


class DrainIncomplete(FunctionError):
    """The grace was over before every request had been answered."""

    code = "drain_incomplete"
    exit_code = 71


class WorkerCrashed(FunctionError):
    """The worker process died again and again."""

    code = "worker_crashed"
    exit_code = 69


class StaleLayer(FunctionError):
    """The layer that this worker was forked from has another model than the agent lends it."""

    code = "stale_layer"
    exit_code = 73
    status = 503


class BadRequest(FunctionError):
    """The request cannot be served as it stands."""

    code = "bad_request"
    status = 400

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.param = param


class RequestTooLarge(FunctionError):
    """The request's body exceeds GLOWPLUG_MAX_BODY."""

    code = "request_too_large"
    status = 413


class AnswerTooLong(FunctionError):
    """The answer took longer than GLOWPLUG_ANSWER_LIMIT."""

    code = "answer_limit"
    status = 504

    @classmethod
    def of_stream(cls) -> AnswerTooLong:
        return cls(
            "the answer took longer than GLOWPLUG_ANSWER_LIMIT and ends here, before the platform would cut it; what "
            "was sent is right: ask for the rest, for less, or raise the limit together with the platform's timeout"
        )


class EngineBusy(FunctionError):
    """All slots and the queue are taken."""

    code = "busy"
    status = 429

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class NotReady(FunctionError):
    """The model is still on its way and too many requests wait for it already."""

    code = "starting"
    status = 503

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class EngineFailed(FunctionError):
    """The engine broke while this request was in flight."""

    code = "engine_failed"
    exit_code = 72
    status = 500


class SnapshotRefused(FunctionError):
    """A generation cannot be continued here: other revision, other format, or damaged."""

    code = "snapshot_refused"
    status = 409


class NotResumable(FunctionError):
    """Nothing is kept of such requests, so none can be gone on with."""

    code = "not_resumable"
    status = 409


class RequestGone(FunctionError):
    """Nothing is kept of this request any more, or it never was."""

    code = "request_gone"
    status = 410


class Moved(FunctionError):
    """This answer goes on elsewhere, or can: send the request again with the last event's id, or with its key."""

    code = "moved"
    status = 503

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Unsupported(FunctionError):
    """The model or the engine cannot do what was asked."""

    code = "unsupported"
    status = 400
