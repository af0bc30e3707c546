"""Owns a function's start and its end: HTTP first, then lease, imports, weights, engine, handler; drain; exit code.

main thread     HTTP (gunicorn), from the first 150 ms until the last request is out
importer        imports torch and transformers, once HTTP is up
starter         asks the agent for the weights, and assembles the model when it has them and the imports
agent           listens to the lease: drain, revision
shim            listens to the shim: retire, another agent; and ends the process when the shim is gone
drainer         waits for SIGTERM, lets requests end, ends the process
pages           enters the weights' pages into this process's tables, while the rest of the start goes on
engine          created by the engine itself
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from cache_agent.errors import AgentError
from cache_agent.ledger import Ledger, Span
from cache_agent.wire.messages import Drain, RevisionNotice
from runtime.config import FunctionConfig, from_environment, gone
from runtime.errors import DrainIncomplete, EngineFailed, FunctionError, WeightsUnavailable
from runtime.http.lifecycle import Lifecycle
from runtime.process import messages
from runtime.process.control import WorkerEnd
from runtime.worker.assembly import Assembled, Assembly
from runtime.worker.leasing import Leasing
from runtime.worker.reporting import Reporting

if TYPE_CHECKING:
    from runtime.function.handler import Handler
    from runtime.handoff.incoming import Incoming
    from runtime.http.server import HttpServer
    from runtime.resume.sessions import Sessions
    from runtime.worker.layer import WarmLayer

log = logging.getLogger("glowplug.worker")

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS = 2.0  # seconds in which the agent is told of what did not end in time
_REPORTS = 10.0  # seconds in which the agent is told of what went well, within the time that the platform gives
_LAST_ANSWERS = 2.0  # seconds for answers at the end: of those who waited for a failed start, of the last at the port


class Worker:
    """One worker process; `run()` is its life and returns the exit code."""

    def __init__(
        self,
        config: FunctionConfig,
        ledger: Ledger,
        line: WorkerEnd,
        terminate: threading.Event,
        warm: WarmLayer | None = None,
    ) -> None:
        """`terminate` is set by the signals that end the process. `warm` is the layer that it was forked from; without
        one it imports everything itself."""
        self._config = config
        self._warm = warm
        self._ledger = ledger
        self._line = line
        self._lifecycle = Lifecycle(config.served_name, config.slots + config.queue)
        self._http: Future[HttpServer] = Future()  # made while a start without a layer runs already
        self._terminate = terminate
        self._over = threading.Event()  # nothing is served any more
        self._cut = 0  # requests that the grace was too short for
        self._end_at = 0.0  # when the grace is over; 0 while nobody has asked for the end
        self._sessions: Sessions | None = None
        self._moving: Incoming | None = None
        self._given_up = threading.Event()  # another worker does the work: the weights are not needed any more
        self._exit: FunctionError | None = None
        self._leasing = Leasing(config, ledger, line, self._lifecycle, None if warm is None else warm.known)
        self._reporting = Reporting(config, ledger, line, self._lifecycle, self._leasing.client)
        if warm is not None:
            self._reporting.kind = warm.level
        self._assembly = Assembly(config, ledger, self._lifecycle, self._leasing, self._reporting, warm, self._broken)

    def run(self, sock: socket.socket, parent: int, accepted: Sequence[socket.socket] = ()) -> int:
        if self._warm is None:
            self._begin()
        with self._ledger.span("http"):
            server = self._make_server(sock, parent, accepted)
        threading.Thread(target=self._end, name="drainer", daemon=True).start()
        threading.Thread(target=self._obey, name="shim", daemon=True).start()
        self._lifecycle.on_load = lambda turn, inside: self._line.send(load=inside, turn=turn)
        self._line.send(state="http")
        self._http.set_result(server)
        if self._warm is None:
            self._assembly.import_modules()  # importing holds the interpreter's lock, and probes come first
        else:
            self._begin()  # two threads that only compute have no more of the interpreter's lock than one
        server.run_until_stopped()
        self._over.set()
        if server.retired:
            self._line.send(state="retired")
        if self._exit is None and self._terminate.is_set():
            self._ended()
        self._say_last()
        return self._exit.exit_code if self._exit else 0

    def _make_server(self, sock: socket.socket, parent: int, accepted: Sequence[socket.socket]) -> HttpServer:
        from runtime.http.application import Application
        from runtime.http.server import HttpServer

        prepared, settings = (self._warm.http if self._warm is not None else None) or (None, None)
        return HttpServer(
            sock,
            Application(
                self._config, self._lifecycle, self._ledger, self._drain, lambda: self._reporting.kind, prepared
            ),
            capacity=self._config.slots + self._config.queue,
            parent=parent,
            on_beat=self._reporting.beat,
            accepted=accepted,
            settings=settings,
        )

    @property
    def _server(self) -> HttpServer:
        """Waits until the server is there."""
        return self._http.result()

    # --- start ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        threading.Thread(target=self._start, name="starter", daemon=True).start()

    def _start(self) -> None:
        try:
            self._prepare()
        except FunctionError as error:
            self._fail(error)
        except AgentError as error:
            self._fail(WeightsUnavailable(f"{error.text} [{error.code}]"))
        except BaseException as error:
            log.exception("the start failed")
            self._fail(FunctionError(f"the start failed: {type(error).__name__}: {error}"))

    def _prepare(self) -> None:
        assembled = self._leasing.leased(self._assembly.assemble)  # torch is imported while the bytes are on their way
        model, handler = assembled.model, None
        gc.freeze()  # what is there now stays; looking through it for garbage would take a third of a second each time
        gc.enable()
        if self._config.handler:
            self._lifecycle.phase = "handler"
            with self._ledger.span("handler"):
                handler = self._import_handler(assembled)
        from runtime.handoff.incoming import make_incoming
        from runtime.resume.sessions import make_sessions

        self._sessions = model.sessions = make_sessions(self._config, self._leasing.client, lambda: model.identity)
        self._moving = make_incoming(
            self._config, self._leasing.client, model, self._lifecycle, lambda: self._released(assembled)
        )
        self._lifecycle.phase = "serving"
        self._lifecycle.opened(model, handler)
        if self._moving is not None and self._lifecycle.draining:
            self._moving.depart()
        self._reporting.spans()
        self._line.send(state="ready", kind=assembled.kind)
        threading.Thread(target=self._listen, args=(assembled,), name="agent", daemon=True).start()
        self._reporting.start()

    def _import_handler(self, assembled: Assembled) -> Handler:
        place = self._config.handler, self._config.packages, assembled.model, assembled.weights.guard.scope
        if self._config.reload:
            from runtime.function.reload import Reloading

            following = Reloading(*place)
            following.watch()
            return following
        from runtime.function import handler as handlers

        return handlers.load(*place)

    def _broken(self, why: str) -> None:
        """The requests in flight know it already; a new worker can serve the next ones, this one cannot."""
        self._fail(EngineFailed(f"{why}; the worker ends, so that another takes its place"))

    def _fail(self, error: FunctionError) -> None:
        """Answers those who waited, tells the shim why, and ends the process with the error's code."""
        log.error("%s [%s]", error.text, error.code)
        self._lifecycle.fail(error)
        self._line.send(error=error.code, text=error.text)
        self._reporting.start()
        server = self._server
        self._exit = error
        server.wait_idle(time.monotonic() + _LAST_ANSWERS)
        server.stop()

    # --- serving --------------------------------------------------------------------------------------------------

    def _listen(self, assembled: Assembled) -> None:
        """The agent's pushes. The weights outlive the agent: whoever serves next is offered them."""
        model, lease = assembled.model, assembled.lease
        while True:
            try:
                while True:
                    match lease.next_event(60.0):
                        case RevisionNotice(revision):
                            model.revision = model.engine.revision = revision
                        case Drain(reason, _):
                            self._drain(f"the agent says: {reason}")
            except AgentError as error:
                if self._given_up.is_set():
                    lease.close()
                    return
                log.warning("%s; this function goes on with the weights that it maps", error)
            self._leasing.rejoin(lease)

    def _obey(self) -> None:
        for message in self._line.messages():
            match message:
                case {"retire": _} if self._lifecycle.inside:  # on behalf of another replica, without a connection
                    self._line.send(state="needed")
                case {"retire": _}:
                    self._server.retire(lambda retired: None if retired else self._line.send(state="needed"))
                case {"agent": str(path)}:
                    self._leasing.private_agent(path)
        log.warning("the shim is gone; the worker ends with it")
        self._server.stop(at_once=True)

    def _released(self, assembled: Assembled) -> None:
        """Another worker does the work: weights and model go now, not when this process ends."""
        self._given_up.set()
        assembled.model.let_go()  # by name, and not by collecting garbage: that would hold every stream up for 0.3 s
        assembled.weights.close()
        assembled.lease.interrupt()
        log.info("all work is another replica's; the model is released")

    # --- end ------------------------------------------------------------------------------------------------------

    def _drain(self, reason: str) -> None:
        if self._lifecycle.drain(reason):
            log.info("draining: %s", reason)
            self._line.send(state="draining")
            if self._moving is not None and self._lifecycle.state == "draining":
                self._moving.depart()

    def _end(self) -> None:
        self._terminate.wait()
        self._drain("SIGTERM")
        grace = self._config.drain_grace
        end = self._end_at = time.monotonic() + self._config.drain_linger + grace
        # The platform routes new requests here until it notices: those are answered, too.
        time.sleep(self._config.drain_linger)
        # So are those that come later still, as long as there is time for one as long as the last ones were.
        self._server.wait_idle(end - min(grace / 2, max(_LAST_ANSWERS, self._lifecycle.longest)))
        last_words = self._sessions is not None or self._moving is not None
        self._server.finish(end + 2 * _LAST_WORDS if last_words else end)
        if last_words and not self._over.wait(max(0.0, end - time.monotonic())):
            # What still runs ends with an error that says how to go on, and can be gone on with.
            self._cut = self._server.in_hand
            if self._moving is not None:
                self._moving.close("this replica ends", end + _LAST_WORDS)
            if self._sessions is not None:
                self._sessions.close(time.monotonic() + _LAST_WORDS)

    def _ended(self) -> None:
        """After the last request, or the grace: the verdict."""
        if self._sessions is not None:
            self._sessions.close(time.monotonic() + _LAST_WORDS)
        if cut := self._cut or self._server.in_hand:
            self._exit = DrainIncomplete(
                f"{cut} requests had not ended {self._config.drain_grace:.0f} s after SIGTERM and were cut; "
                "raise GLOWPLUG_DRAIN_GRACE and the platform's own grace"
            )
            log.error("%s [%s]", self._exit.text, self._exit.code)
        self._lifecycle.drained()
        self._line.send(state="drained")

    def _say_last(self) -> None:
        """What agent and shim have not heard yet: a process that ends takes it along."""
        now = time.monotonic()
        deadline = max(now + _LAST_WORDS, min(now + _REPORTS, self._end_at + _LAST_WORDS))
        if self._moving is not None:
            self._moving.close("this replica ends", deadline)
        self._reporting.close(deadline)


def serve(
    listen_fd: int,
    control_fd: int,
    start_id: str,
    spans: Iterable[messages.Span],
    warm: WarmLayer,
    *,
    why: str,
    connections: Sequence[int] = (),
) -> int:
    """The life of a worker that was forked from a layer; `why` it was not a deeper one. `connections` wait for it."""
    ledger = _ledger(start_id, spans, f"fork from {warm.level}" + (f", {why}" if why else ""), time.monotonic_ns())
    return _live(listen_fd, control_fd, ledger, 0, warm, [socket.socket(fileno=fd) for fd in connections])


def _ledger(start_id: str, spans: Iterable[messages.Span], name: str, born: int) -> Ledger:
    ledger = Ledger("worker", start_id)
    ledger.extend(Span(*row) for row in spans)
    asked = max((span.end for span in ledger.spans() if span.owner == "shim"), default=born)
    ledger.add(name, min(asked, born), born)
    return ledger


def _live(
    listen_fd: int,
    control_fd: int,
    ledger: Ledger,
    parent: int,
    warm: WarmLayer | None = None,
    accepted: Sequence[socket.socket] = (),
) -> int:
    config = from_environment()
    log_to_stderr(config.log_level)
    for text in gone(os.environ):
        log.warning("%s", text)
    line = WorkerEnd(socket.socket(fileno=control_fd))
    terminate = threading.Event()
    for number in _STOPPING:
        signal.signal(number, lambda _number, _frame: terminate.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)  # the shim blocked them for as long as nobody listened
    try:
        return Worker(config, ledger, line, terminate, warm).run(socket.socket(fileno=listen_fd), parent, accepted)
    except FunctionError as error:
        line.send(error=error.code, text=error.text)
        return error.exit_code


def log_to_stderr(level: str) -> None:
    """Once more in each child of a layer. Levels are mostly left to the handler: to set a logger's goes through all
    others, and a child would get a copy of each page on which one of them lies."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
    for handler in root.handlers:
        handler.setLevel(level.upper())
    if root.handlers[0].level < root.level:
        root.setLevel(level.upper())


def main(arguments: list[str]) -> int:
    """`arguments`: fds of the listening socket and the control line, pid of the shim, start id, its spans as JSON, and
    fds of connections that wait already."""
    born = time.monotonic_ns()
    gc.disable()  # until the model is there: hardly anything of what a start makes is garbage
    listen_fd, control_fd, parent, start_id, spans, *connections = arguments
    for fd in (listen_fd, control_fd, *connections):
        os.set_inheritable(int(fd), False)
    accepted = [socket.socket(fileno=int(fd)) for fd in connections]
    ledger = _ledger(start_id, json.loads(spans), "python", born)
    return _live(int(listen_fd), int(control_fd), ledger, int(parent), accepted=accepted)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Not sys.exit: threads of user code, or a request that outlived its grace, must not keep a replica alive.
    os._exit(code)
