"""Owns the engine thread and the live generations: slots, queue, streams and every verb of the contract.

An engine is this loop and its `step`. One thread makes all steps. One lock guards everything shared: all threads decide
under the lock and act outside of it.

    submit ──► waiting ──► running ⇄ paused (export / resume) ──► ended
                              └── step ──► (row, event) … ──► the row's stream

A row in the step in progress belongs to the engine thread, a paused row to the caller of `export`.
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
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from runtime.engine.base import Codec, EngineStats, Finish, GenerationRequest, GenerationState, KVRow, TokenEvent
from runtime.engine.bounds import Bounds
from runtime.engine.generation import Generation
from runtime.engine.stream import Stream
from runtime.errors import BadRequest, EngineBusy, EngineFailed, SnapshotRefused

_log = logging.getLogger("glowplug.engine")

# Upper bounds of waits, in seconds, which are only reached when something is broken.
_STEP_LIMIT = 300.0
_IDLE_WAIT = 30.0
# Steps that fail in a row before the engine gives up: no request is to blame then, and a new process may do better.
_FAILURES = 3

M = TypeVar("M")  # an engine's memory of a generation between two steps: its keys and values
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineWatch:
    """Calls for what an engine's owner wants to know; each is made at most once, from the engine thread."""

    first_token: Callable[[int], None] | None = None
    """Takes the time (ns, CLOCK_MONOTONIC) at which the generation with the very first token was asked for."""
    broken: Callable[[str], None] | None = None
    """Takes the reason why the engine broke; it serves nothing after that."""


UNWATCHED = EngineWatch()


class Row(Generic[M]):
    """A live generation, its stream and the engine's memory of it."""

    def __init__(
        self, generation: Generation, cancel: Callable[[Row[M] | None], None], *, paused: bool = False
    ) -> None:
        """`cancel` gets this row, if it still exists, when the stream's reader leaves."""
        self.generation = generation
        self.memory: M | None = None
        self.paused = paused
        self.ended = False
        self.promised = False  # whether memory has been set aside for the row
        self.born = time.monotonic_ns()
        self.since = 0.0  # when the row got its slot, on time.monotonic
        row = weakref.ref(self)  # a reader that is slow to go must not keep the row's memory
        self.stream = Stream(generation.request.id, lambda: cancel(row()))


class Loop(ABC, Generic[M]):
    """The part of an engine that is the same for all of them.

    `slots` generations run at once, `queue_size` more wait. Subclasses implement `step`, `embed_one` and, if their
    generations have a memory, `pack` and `unpack`; they call `start` when they are ready to step.
    """

    kind: str
    arithmetic = ""  # see `GenerationState`

    def __init__(
        self,
        codec: Codec,
        *,
        revision: str,
        bounds: Bounds,
        slots: int,
        queue_size: int,
        watch: EngineWatch = UNWATCHED,
    ) -> None:
        self.revision = revision
        self.context_length = bounds.context_length
        self.codec = codec
        self._bounds = bounds
        self._slots = slots
        self._queue_size = queue_size
        self._promised = 0  # bytes of memory, set aside for the whole of every generation that has its slot
        self._wake = threading.Condition()
        self._rows: dict[str, Row[M]] = {}  # every live row, by request id
        self._waiting: deque[Row[M]] = deque()
        self._running: list[Row[M]] = []
        self._stepping: Sequence[Row[M]] = ()  # the rows of the step in progress
        self._tasks: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._down: str | None = None  # why nothing is accepted any more
        self._watch = watch
        self._fresh = True  # no token has been made yet
        self._failures = 0
        self._seconds = 1.0  # smoothed time that a generation occupies its slot
        self._thread = threading.Thread(target=self._run, name=f"glowplug-engine-{self.kind}", daemon=True)

    # What an engine adds. All but `choose`, `promise` and `cached` are called without the lock.

    @abstractmethod
    def step(self, rows: Sequence[Row[M]]) -> Iterable[tuple[Row[M], TokenEvent]]:
        """Do one piece of work for `rows`, as short as a forward pass, and yield the events of their generations."""

    @abstractmethod
    def embed_one(self, prompt: Sequence[int]) -> list[float]:
        """Return the vector of a prompt whose ids have been checked; see `Engine.embed`."""

    def choose(self, rows: Sequence[Row[M]]) -> Sequence[Row[M]]:
        """Return those of the runnable `rows` (never empty) that the next step is for. The lock is held: be quick."""
        return rows

    def promise(self, size: int) -> bool:
        """Set `size` bytes of memory aside; False if they are not free. The lock is held: this only counts."""
        if self._bounds.memory is not None and self._promised + size > self._bounds.memory:
            return False
        self._promised += size
        return True

    def cached(self) -> tuple[int, int]:
        """Return `cached` and `reused` of `EngineStats`. The lock is held."""
        return 0, 0

    def pack(self, row: Row[M]) -> tuple[KVRow, ...]:  # noqa: ARG002  for engines that override it
        """Return the memory of a paused row; () if the receiver is to recompute it."""
        return ()

    def unpack(self, generation: Generation, kv: tuple[KVRow, ...]) -> M | None:  # noqa: ARG002
        """Return the memory that `pack` made rows of. Raise `SnapshotRefused`."""
        return None

    def again(self, generation: Generation) -> float:  # noqa: ARG002
        """Estimate the seconds in which all tokens of `generation` could be fed once more; 0 for unknown."""
        return 0.0

    def begin(self) -> None:
        """Prepare the engine thread; called once on that thread, before the first step."""

    # The contract.

    def submit(self, request: GenerationRequest) -> Stream:
        self._bounds.check(request)
        return self._enter(Row[M](Generation(request, self.codec), self._cancel))

    def cancel(self, request_id: str) -> None:
        with self._wake:
            row = self._rows.get(request_id)
        self._cancel(row)

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
            self._bounds.check(state.request)
            generation = Generation.restore(state, self.codec)
        except (BadRequest, ValueError) as error:
            raise SnapshotRefused(f"the generation cannot go on here: {error}") from error
        row = Row[M](generation, self._cancel, paused=True)
        stream = self._enter(row, at_once=True)
        try:
            row.memory = self.unpack(generation, state.kv) if state.kv else None
        except BaseException:
            self._leave(row, "error")
            raise
        self.resume(stream.request_id)
        return stream

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        for prompt in prompts:
            self._bounds.check_ids(prompt, "input")
        return [self.embed_one(prompt) for prompt in prompts]

    def stats(self) -> EngineStats:
        with self._wake:
            running, waiting, limit = len(self._running), len(self._waiting), self._bounds.memory or 0
            return EngineStats(running, waiting, self._slots, self._queue_size, self._promised, limit, *self.cached())

    def close(self) -> None:
        with self._wake:
            self._down = self._down or "the function is shutting down"
            self._wake.notify_all()
        self._thread.join(_STEP_LIMIT)

    # For engines and their owners.

    def start(self) -> None:
        self._thread.start()

    def recompute(self, request_id: str) -> tuple[int, float]:
        """Return the bytes of a live generation's memory, and about how many seconds making them anew takes (0:
        unknown)."""
        with self._wake:
            row = self._rows.get(request_id)
        if row is None:
            return 0, 0.0
        return row.generation.length * self._bounds.token_bytes, self.again(row.generation)

    def call(self, task: Callable[[], T]) -> T:
        """Run `task` on the engine thread between two steps and return its result. Raise `EngineFailed`."""
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

    def _enter(self, row: Row[M], *, at_once: bool = False) -> Stream:
        """Put a row into the queue; with `at_once` only if there is a slot and memory for it now."""
        request_id = row.generation.request.id
        with self._wake:
            if self._down:
                raise EngineFailed(self._down)
            if request_id in self._rows:
                # A reader that has come back over another connection may have left the live generation already.
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
        """Set memory aside for a row; False if there is none. The lock is held."""
        row.promised = row.promised or self.promise(self._bounds.cost(row.generation.request))
        return row.promised

    def _cancel(self, row: Row[M] | None) -> None:
        self._leave(row, "cancelled")

    def _leave(self, row: Row[M] | None, finish: Finish, error: str | None = None) -> None:
        """End a row that did not end by itself. A row in the step in progress is dropped when the step is done."""
        if row is not None:
            with self._wake:
                self._end(row, TokenEvent(len(row.generation.generated), None, "", finish, error))

    def _end(self, row: Row[M], event: TokenEvent) -> None:
        """Take a row out of the engine, with `event` as the last one of its stream. The lock is held."""
        if row.ended:
            return
        row.ended = True
        del self._rows[row.generation.request.id]
        if row in self._running:
            self._running.remove(row)
            self._seconds += 0.2 * (time.monotonic() - row.since - self._seconds)
        else:
            self._waiting.remove(row)
        if row.promised:
            row.promised = False
            self._promised -= self._bounds.cost(row.generation.request)
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
        if broken and self._watch.broken is not None:
            self._watch.broken(why)

    def _turn(self) -> bool:
        """Wait for work, then do one task and one step. False once the engine is to stop."""
        with self._wake:
            while not self._down:
                # No row overtakes the oldest, or one that needs much memory would wait for ever.
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
                if self._fresh and event.token is not None:
                    self._fresh = False
                    if self._watch.first_token is not None:
                        self._watch.first_token(row.born)
                with self._wake:
                    if event.finish is not None:
                        self._end(row, event)
                    elif not row.ended:
                        row.stream.put(event)
            self._failures = 0
        except Exception as error:
            # Any row of the step may be to blame; rows of other steps are unharmed.
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
