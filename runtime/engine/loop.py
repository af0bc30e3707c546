"""Owns the engine thread and the live generations: slots, queue, streams and every verb of the contract.

An engine is this loop and its `step`. One thread makes all steps; everything shared sits under one lock, and both
sides decide under it and act outside it:

    submit ──► waiting ──► running ⇄ paused (export / resume) ──► ended
                              └── step ──► (row, event) … ──► the row's stream

A row in the step in progress belongs to the engine thread; a paused row belongs to whoever exports it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar, cast

from runtime.engine.base import (
    Codec,
    EngineStats,
    Finish,
    GenerationRequest,
    GenerationState,
    KVRow,
    TokenEvent,
)
from runtime.engine.generation import Generation
from runtime.engine.stream import Stream
from runtime.errors import BadRequest, EngineBusy, EngineFailed, SnapshotRefused

_log = logging.getLogger("glowplug.engine")

# Upper bounds of waits, in seconds. None of them is ever reached unless something is broken.
_STEP_LIMIT = 300.0
_IDLE_WAIT = 30.0
# So many failed steps in a row are no request's fault: the engine gives up, for a new process may do better.
_FAILURES = 3

M = TypeVar("M")  # what an engine remembers of a generation between steps: its KV cache
T = TypeVar("T")


class Row(Generic[M]):
    """A live generation, its stream and the engine's memory of it."""

    def __init__(self, generation: Generation, *, paused: bool = False) -> None:
        self.generation = generation
        self.memory: M | None = None
        self.paused = paused
        self.ended = False
        self.held = False  # whether memory has been set aside for it
        self.born = time.monotonic_ns()
        self.since = 0.0  # when it got its slot
        self.stream: Stream


class Loop(ABC, Generic[M]):
    """The part of an engine that is the same for all of them.

    `slots` generations run at once, `queue_size` more wait. Subclasses implement `step` and, if their generations
    have a memory, `pack` and `unpack`; they call `start` when they are ready to step.
    """

    kind: str
    arithmetic = ""  # what the bits of its results depend on besides the request; see `GenerationState`

    def __init__(
        self,
        codec: Codec,
        *,
        revision: str,
        context_length: int,
        vocabulary: int,
        slots: int,
        queue_size: int,
        memory: int | None = None,
        token_bytes: int = 0,
    ) -> None:
        """`memory` bytes hold what generations remember, `token_bytes` of each of their tokens; None: no bound."""
        self.revision = revision
        self.context_length = context_length
        self.codec = codec
        self._vocabulary = vocabulary
        self._slots = slots
        self._queue_size = queue_size
        self._memory = memory
        self._token_bytes = token_bytes
        self._promised = 0  # bytes of it, set aside for the whole of every generation that has its slot
        self._wake = threading.Condition()
        self._rows: dict[str, Row[M]] = {}  # every live row, by request id
        self._waiting: deque[Row[M]] = deque()
        self._running: list[Row[M]] = []
        self._stepping: Sequence[Row[M]] = ()  # the rows of the step in progress
        self._tasks: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._down: str | None = None  # why nothing is accepted any more
        # Called once: when (ns, CLOCK_MONOTONIC) the generation that made the very first token was asked for.
        self.on_first_token: Callable[[int], None] | None = None
        # Called once, from the engine thread: why it broke, when it did. Nothing is served after that.
        self.on_broken: Callable[[str], None] | None = None
        self._failures = 0
        self._seconds = 1.0  # smoothed time that a generation holds its slot
        self._thread = threading.Thread(target=self._run, name=f"glowplug-engine-{self.kind}", daemon=True)

    # What an engine adds. Called without the lock, but for `choose` and `promise`.

    @abstractmethod
    def step(self, rows: Sequence[Row[M]]) -> Iterable[tuple[Row[M], TokenEvent]]:
        """One piece of work for `rows`, as short as a forward pass: advances generations, yields what came of it."""

    def choose(self, rows: Sequence[Row[M]]) -> Sequence[Row[M]]:
        """Which of the runnable `rows` (never empty) the next step is for. Called with the lock held: be quick."""
        return rows

    def promise(self, size: int) -> bool:
        """Sets `size` bytes of memory aside; False if they are not there. Called with the lock held: only counts."""
        if self._memory is not None and self._promised + size > self._memory:
            return False
        self._promised += size
        return True

    def kept(self) -> tuple[int, int]:
        """`kept` and `reused` of `EngineStats`. Called with the lock held."""
        return 0, 0

    def pack(self, row: Row[M]) -> tuple[KVRow, ...]:  # noqa: ARG002  for engines that override it
        """The memory of a paused row; () if the receiver is to recompute it."""
        return ()

    def again(self, generation: Generation) -> float:  # noqa: ARG002
        """About how many seconds feeding all of it once more would take; 0 where that is not known."""
        return 0.0

    def unpack(self, generation: Generation, kv: tuple[KVRow, ...]) -> M | None:  # noqa: ARG002
        """The memory that `pack` made. Raises `SnapshotRefused`."""
        return None

    def begin(self) -> None:
        """Called once, on the engine thread, before its first step."""

    # The contract.

    def submit(self, request: GenerationRequest) -> Stream:
        self._check(request)
        return self._enter(Row[M](Generation(request, self.codec)))

    def cancel(self, request_id: str) -> None:
        with self._wake:
            row = self._rows.get(request_id)
        if row is not None:
            self._leave(row, "cancelled")

    def export(self, request_id: str, *, kv: bool = True) -> GenerationState:
        with self._wake:
            row = self._rows[request_id]
            row.paused = True
            if not self._wake.wait_for(lambda: row not in self._stepping, _STEP_LIMIT):
                row.paused = False
                raise EngineFailed(f"the step in progress took more than {_STEP_LIMIT:.0f} s; nothing was exported")
            if row.ended:
                raise KeyError(request_id)
        arithmetic = self.arithmetic if row.generation.request.deterministic else ""
        return row.generation.state(self.kind, self.revision, self.pack(row) if kv else (), arithmetic)

    def resume(self, request_id: str) -> None:
        with self._wake:
            if (row := self._rows.get(request_id)) is not None:
                row.paused = False
                self._wake.notify_all()

    def forget(self, request_id: str) -> None:
        with self._wake:
            row = self._rows.get(request_id)
        if row is not None:
            self._leave(row, "moved")

    def admit(self, state: GenerationState) -> Stream:
        if (state.engine, state.revision) != (self.kind, self.revision):
            raise SnapshotRefused(
                f"the snapshot is of a {state.engine} engine on revision {state.revision}, "
                f"this is a {self.kind} engine on {self.revision}; send it to a replica of the same function"
            )
        if state.request.deterministic and state.arithmetic != self.arithmetic:
            raise SnapshotRefused(
                f"the request is deterministic and was begun with {state.arithmetic or 'another engine'}, this replica "
                f"has {self.arithmetic or 'another engine'}; send it to one that computes alike"
            )
        try:
            self._check(state.request)
            generation = Generation.restore(state, self.codec)
        except (BadRequest, ValueError) as error:
            raise SnapshotRefused(f"the generation cannot go on here: {error}") from error
        row = Row[M](generation, paused=True)
        stream = self._enter(row, at_once=True)
        try:
            row.memory = self.unpack(generation, state.kv) if state.kv else None
        except BaseException:
            self._leave(row, "error")
            raise
        self.resume(stream.request_id)
        return stream

    def stats(self) -> EngineStats:
        with self._wake:
            running, waiting = len(self._running), len(self._waiting)
            return EngineStats(
                running, waiting, self._slots, self._queue_size, self._promised, self._memory or 0, *self.kept()
            )

    def close(self) -> None:
        with self._wake:
            self._down = self._down or "the function is shutting down"
            self._wake.notify_all()
        self._thread.join(_STEP_LIMIT)

    # For engines and their owners.

    def start(self) -> None:
        self._thread.start()

    def recompute(self, request_id: str) -> tuple[int, float]:
        """Bytes that a live generation remembers, and about how many seconds they take to be made anew (0: unknown)."""
        with self._wake:
            row = self._rows.get(request_id)
        return (row.generation.length * self._token_bytes, self.again(row.generation)) if row is not None else (0, 0.0)

    def call(self, task: Callable[[], T]) -> T:
        """Runs `task` on the engine thread between two steps and returns its result. Raises `EngineFailed`."""
        future: Future[object] = Future()
        with self._wake:
            if self._down:
                raise EngineFailed(self._down)
            self._tasks.append((task, future))
            self._wake.notify_all()
        try:
            return cast(T, future.result(_STEP_LIMIT))
        except TimeoutError as error:
            raise EngineFailed(f"the engine was busy for more than {_STEP_LIMIT:.0f} s") from error

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises `BadRequest` for ids that the model cannot take in; `param` is what the caller knows them as."""
        if not 0 < len(ids) <= self.context_length:
            raise BadRequest(f"the {param} has {len(ids)} tokens; it must have 1..{self.context_length}", param)
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise BadRequest(f"the {param} has token ids outside of 0..{self._vocabulary - 1}", param)

    def _check(self, request: GenerationRequest) -> None:
        length = len(request.prompt)
        self.check_ids(request.prompt, "prompt")
        if request.max_tokens < 1:
            raise BadRequest(f"max_tokens is {request.max_tokens}; ask for at least 1", "max_tokens")
        if length + request.max_tokens > self.context_length:
            raise BadRequest(
                f"the prompt has {length} tokens and max_tokens is {request.max_tokens}, together more than the "
                f"model's context of {self.context_length} tokens; shorten one of them",
                "max_tokens" if length < self.context_length else "prompt",
            )
        if self._memory is not None and self._cost(request) > self._memory:
            tokens, room = length + request.max_tokens, self._memory // self._token_bytes
            raise BadRequest(
                f"prompt and max_tokens come to {tokens} tokens, and the memory here holds those of {room}; "
                "ask for fewer tokens, or raise the memory limit or GLOWPLUG_KV_MEMORY",
                "max_tokens",
            )
        if any(not 0 <= token < self._vocabulary for token in request.sampling.logit_bias):
            raise BadRequest(f"logit_bias names token ids outside of 0..{self._vocabulary - 1}", "logit_bias")

    def _enter(self, row: Row[M], *, at_once: bool = False) -> Stream:
        """Puts a row into the queue; `at_once` only if there is a slot and memory for it now."""
        request_id = row.generation.request.id
        weak = weakref.ref(row)
        row.stream = Stream(request_id, lambda: self._leave(weak(), "cancelled"))
        with self._wake:
            if self._down:
                raise EngineFailed(self._down)
            if request_id in self._rows:
                # Its last reader may be about to leave, as one that has come back over another connection.
                raise EngineBusy(f"a generation with the id {request_id!r} is live already; try again in a moment")
            full = len(self._rows) >= self._slots + (0 if at_once else self._queue_size)
            if full or (at_once and not self._take(row)):
                turn = self._seconds * (len(self._waiting) + 1) / self._slots
                taken = f"all {self._slots} slots are" if full else "the memory for keys and values is"
                raise EngineBusy(
                    f"{taken} taken and {len(self._waiting)} requests wait; try again later",
                    retry_after=min(60.0, max(1.0, turn)),
                )
            self._rows[request_id] = row
            self._waiting.append(row)
            self._wake.notify_all()
        return row.stream

    def _take(self, row: Row[M]) -> bool:
        """With the lock held."""
        row.held = row.held or self.promise(self._cost(row.generation.request))
        return row.held

    def _cost(self, request: GenerationRequest) -> int:
        return (len(request.prompt) + request.max_tokens) * self._token_bytes

    def _leave(self, row: Row[M] | None, finish: Finish, error: str | None = None) -> None:
        """Ends a row that did not end by itself. A row in the step in progress is dropped when the step is done."""
        if row is not None:
            with self._wake:
                self._end(row, TokenEvent(len(row.generation.generated), None, "", finish, error))

    def _end(self, row: Row[M], event: TokenEvent) -> None:
        """With the lock held."""
        if row.ended:
            return
        row.ended = True
        del self._rows[row.generation.request.id]
        if row in self._running:
            self._running.remove(row)
            self._seconds += 0.2 * (time.monotonic() - row.since - self._seconds)
        else:
            self._waiting.remove(row)
        if row.held:
            row.held = False
            self._promised -= self._cost(row.generation.request)
        row.stream.put(event)
        self._wake.notify_all()

    # The engine thread.

    def _run(self) -> None:
        why, broken = "the engine stopped", False
        try:
            self.begin()
            while self._turn():
                pass
        except BaseException as error:
            _log.exception("the engine thread broke and accepts nothing any more")
            why, broken = f"the engine broke ({type(error).__name__}); the function's log says where", True
        with self._wake:
            self._down = why = self._down or why
            self._stepping = ()
            for row in list(self._rows.values()):
                self._end(row, row.generation.end("error", why))
            tasks, self._tasks = self._tasks, deque()
        for _, future in tasks:
            future.set_exception(EngineFailed(why))
        if broken and self.on_broken is not None:
            self.on_broken(why)

    def _turn(self) -> bool:
        """Waits for work, then does one task and one step. False once the engine is to stop."""
        with self._wake:
            while not self._down:
                # The oldest first, and nobody past it: else one that needs much memory would wait for ever.
                while self._waiting and len(self._running) < self._slots and self._take(self._waiting[0]):
                    row = self._waiting.popleft()
                    row.since = time.monotonic()
                    self._running.append(row)
                runnable = [row for row in self._running if not row.paused]
                if runnable or self._tasks:
                    break
                self._wake.wait(_IDLE_WAIT)
            if self._down:
                return False
            task = self._tasks.popleft() if self._tasks else None
            rows = self._stepping = tuple(self.choose(runnable)) if runnable else ()
        if task is not None:
            _perform(*task)
        try:
            if rows:
                self._step(rows)
        finally:
            with self._wake:
                self._stepping = ()
                self._wake.notify_all()
        return True

    def _step(self, rows: Sequence[Row[M]]) -> None:
        try:
            for row, event in self.step(rows):
                if self.on_first_token is not None and event.token is not None:
                    announce, self.on_first_token = self.on_first_token, None
                    announce(row.born)
                with self._wake:
                    if event.finish is not None:
                        self._end(row, event)
                    elif not row.ended:
                        row.stream.put(event)
            self._failures = 0
        except Exception as error:
            # Whose fault it was cannot be told from here; rows of other steps are unharmed.
            _log.exception("a step failed; its %d generations end with an error", len(rows))
            for row in rows:
                self._leave(row, "error", f"the engine failed on this request ({type(error).__name__}); see the log")
            self._failures += 1
            if self._failures >= _FAILURES:
                raise


def _perform(task: Callable[[], object], future: Future[object]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)
