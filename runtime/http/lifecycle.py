"""Owns a worker's state: its phase, the requests inside, and when the worker may end.

    starting ──opened──► ready ──drain──► draining ──last request out──► drained
        └────fail────► failed

While a worker starts, a bounded number of requests wait inside, and further ones are refused with a Retry-After. A
draining worker goes on answering: platforms route requests to the worker until they notice, and a refused request is a
lost one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from runtime.errors import EngineBusy, FunctionError, NotReady

if TYPE_CHECKING:
    from runtime.function.handler import Handler
    from runtime.function.model import Model

_REMEMBERED = 64  # requests of which the worker remembers the duration
State = Literal["starting", "ready", "draining", "drained", "failed"]


class Lifecycle:
    """The state of one worker. Every method may be called from any thread.

    `phase` names the step of the start, `progress` is (bytes of weights there, bytes in all).
    """

    def __init__(
        self, name: str, capacity: int, on_load: Callable[[int, int], None] = lambda _turn, _inside: None
    ) -> None:
        """`name` is the model's for clients; `capacity` requests may be inside at once, waiting ones counted.

        `on_load(turns, inside)` is called when the first request comes in and when the last one goes out.
        """
        self.name = name
        self._capacity = capacity
        self._on_load = on_load
        self._changed = threading.Condition()
        self._state: State = "starting"
        self._model: Model | None = None
        self._handler: Handler | None = None
        self._error: FunctionError | None = None
        self._inside = 0
        self._turns = 0
        self._took: deque[float] = deque(maxlen=_REMEMBERED)
        self._drain_reason = ""
        self.phase = "http"
        self.progress: tuple[int, int] = (0, 0)

    @property
    def state(self) -> State:
        return self._state

    @property
    def inside(self) -> int:
        return self._inside

    @property
    def turns(self) -> int:
        """The number of times that a request has come in or gone out."""
        return self._turns

    @property
    def handler(self) -> Handler | None:
        return self._handler

    @property
    def error(self) -> FunctionError | None:
        return self._error

    def wait(self, timeout: float) -> Model | None:
        """Return the model, or None if it is not there within `timeout` seconds. Raise the error of a failed start."""
        with self._changed:
            self._changed.wait_for(lambda: self._state != "starting", timeout)
            if self._error is not None:
                raise self._error
            return self._model

    def opened(self, model: Model, handler: Handler | None) -> None:
        """End the start: requests that wait, and all later ones, get the model."""
        with self._changed:
            self._model, self._handler = model, handler
            # The drain may have been asked for while the model was on its way.
            self._state = "draining" if self._drain_reason else "ready"
            self._changed.notify_all()

    def fail(self, error: FunctionError) -> None:
        """Enter the state "failed": requests that wait, and all later ones, are answered with `error`."""
        with self._changed:
            self._error, self._state = error, "failed"
            self._changed.notify_all()

    def enter(self) -> None:
        """Let a request in; `leave` must follow. Raise `NotReady` or `EngineBusy` when the worker is full."""
        with self._changed:
            if self._inside >= self._capacity:
                if self._state == "starting":
                    raise NotReady(f"the model is still loading and {self._inside} requests wait for it already")
                raise EngineBusy(f"{self._inside} requests are being served or wait; try again shortly")
            self._inside += 1
            self._turns += 1
            turn, inside = self._turns, self._inside
        if inside == 1:
            self._on_load(turn, inside)

    def leave(self, took: float = 0.0) -> None:
        """Let a request out that came in `took` seconds ago."""
        with self._changed:
            self._inside -= 1
            self._turns += 1
            turn, inside = self._turns, self._inside
            self._took.append(took)
            self._changed.notify_all()
        if not inside:
            self._on_load(turn, inside)

    @property
    def longest(self) -> float:
        """The seconds that the longest of the last requests took."""
        with self._changed:
            return max(self._took, default=0.0)

    def drain(self, reason: str) -> bool:
        """Begin to drain; False if the drain has begun already. A worker that is starting drains once it is opened."""
        with self._changed:
            if self._drain_reason:
                return False
            self._drain_reason = reason or "asked for"
            if self._state == "ready":
                self._state = "draining"
            self._changed.notify_all()
            return True

    @property
    def draining(self) -> str:
        """The reason of the drain; "" if there is none."""
        return self._drain_reason

    def drained(self) -> None:
        with self._changed:
            if self._state != "failed":
                self._state = "drained"
            self._changed.notify_all()
