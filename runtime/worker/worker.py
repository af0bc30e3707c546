"""Owns a function's start and its end: HTTP first, then lease, imports, weights, engine, handler; drain; exit code.

main thread     serves HTTP, from the first 150 ms until the last request is out; then reports and exits
importer        imports torch and transformers, once HTTP is up
starter         leases the weights, waits for the imports, assembles the model
agent           obeys the agent: drain, revision
shim            obeys the shim: retire, another agent; ends the process when the shim is gone
drainer         waits for SIGTERM, lets requests end, ends the serving
pages           enters the weights' pages into this process's tables, while the rest of the start goes on
engine          makes the steps of generations; started by the engine
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
    from runtime.handoff.handoffs import Handoffs
    from runtime.http.server import HttpServer
    from runtime.resume.sessions import Sessions
    from runtime.worker.layer import WarmLayer

log = logging.getLogger("glowplug.worker")

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS = 2.0  # seconds for the last reports to the agent after the grace
_REPORTS = 10.0  # seconds for them if the worker ends before the end of the grace
_LAST_ANSWERS = 2.0  # seconds for the last requests: those that waited for a failed start, and the last at the port


class Worker:
    """One worker process, from its start to its exit code; see `run`."""

    def __init__(
        self,
        config: FunctionConfig,
        ledger: Ledger,
        line: WorkerEnd,
        terminate: threading.Event,
        warm: WarmLayer | None = None,
    ) -> None:
        """`terminate` is set by the signals that end the process. `warm` is the layer that the worker was forked from;
        without a layer the worker imports everything itself."""
        self._config = config
        self._warm = warm
        self._ledger = ledger
        self._line = line
        self._lifecycle = Lifecycle(
            config.served_name, config.slots + config.queue, lambda turn, inside: line.send(load=inside, turn=turn)
        )
        self._http: Future[HttpServer] = Future()  # a start without a layer begins before the server is there
        self._terminate = terminate
        self._over = threading.Event()  # set once the server has stopped
        self._cut = 0  # requests for which the grace was too short
        self._end_at = 0.0  # the end of the grace, on time.monotonic; 0 before SIGTERM
        self._sessions: Sessions | None = None
        self._handoffs: Handoffs | None = None
        self._given_up = threading.Event()  # set once another worker has all the work, and the weights are released
        self._exit: FunctionError | None = None
        self._leasing = Leasing(config, ledger, line, self._lifecycle, None if warm is None else warm.known)
        kind = "cold" if warm is None else warm.level
        self._reporting = Reporting(config, ledger, line, self._lifecycle, self._leasing.client, kind)
        self._assembly = Assembly(config, ledger, self._lifecycle, self._leasing, self._reporting, warm, self._broken)

    def run(self, sock: socket.socket, parent: int, accepted: Sequence[socket.socket] = ()) -> int:
        """Start, serve on `sock` until the end, and return the exit code.

        The worker ends with the process `parent`, if that is not 0. `accepted` are connections that wait already.
        """
        starter = threading.Thread(target=self._start, name="starter", daemon=True)
        if self._warm is None:
            starter.start()
        with self._ledger.span("http"):
            server = self._make_server(sock, parent, accepted)
        threading.Thread(target=self._end_serving, name="drainer", daemon=True).start()
        threading.Thread(target=self._obey_shim, name="shim", daemon=True).start()
        self._line.send(state="http")
        self._http.set_result(server)
        if self._warm is None:
            self._assembly.import_modules()  # importing holds the interpreter's lock, and probes come first
        else:
            starter.start()  # not sooner: two threads that compute share one interpreter's lock
        server.run_until_stopped()
        self._over.set()
        return self._conclude(server)

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
        """The HTTP server; waits until it is there."""
        return self._http.result()

    # --- start ----------------------------------------------------------------------------------------------------

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
        gc.freeze()  # the objects so far stay; to search them for garbage would take a third of a second each time
        gc.enable()
        if self._config.handler:
            self._lifecycle.phase = "handler"
            with self._ledger.span("handler"):
                handler = self._import_handler(assembled)
        from runtime.handoff.handoffs import make_handoffs
        from runtime.resume.sessions import make_sessions

        self._sessions = model.sessions = make_sessions(self._config, self._leasing.client, lambda: model.identity)
        self._handoffs = make_handoffs(
            self._config, self._leasing.client, model, self._lifecycle, lambda: self._released(assembled)
        )
        self._lifecycle.phase = "serving"
        self._lifecycle.opened(model, handler)
        if self._handoffs is not None and self._lifecycle.draining:
            self._handoffs.depart()
        self._reporting.spans()
        self._line.send(state="ready", kind=assembled.kind)
        threading.Thread(target=self._obey_agent, args=(assembled,), name="agent", daemon=True).start()
        self._reporting.start()

    def _import_handler(self, assembled: Assembled) -> Handler:
        place = self._config.handler, self._config.packages, assembled.model, assembled.weights.guard.scope
        if self._config.reload:
            from runtime.function.reload import Reloading

            reloading = Reloading(*place)
            reloading.watch()
            return reloading
        from runtime.function import handler as handlers

        return handlers.load(*place)

    def _broken(self, why: str) -> None:
        """End the worker because its engine broke. The engine has answered its requests; another worker takes over."""
        self._fail(EngineFailed(f"{why}; the worker ends, so that another takes its place"))

    def _fail(self, error: FunctionError) -> None:
        """Answer the requests that wait, tell the shim why, and end the process with the error's exit code."""
        log.error("%s [%s]", error.text, error.code)
        self._lifecycle.fail(error)
        self._line.send(error=error.code, text=error.text)
        self._reporting.start(_LAST_WORDS)
        server = self._server
        self._exit = error
        server.wait_idle(time.monotonic() + _LAST_ANSWERS)
        server.stop()

    # --- serving --------------------------------------------------------------------------------------------------

    def _obey_agent(self, assembled: Assembled) -> None:
        """Obey the agent's messages. The weights outlive their agent, and are offered to the agent after it."""
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

    def _obey_shim(self) -> None:
        """Obey the shim's messages, and end the worker when the shim is gone."""
        for message in self._line.messages():
            match message:
                case {"retire": _} if self._lifecycle.inside:  # requests of other replicas have no connection here
                    self._line.send(state="needed")
                case {"retire": _}:
                    self._server.retire(lambda retired: None if retired else self._line.send(state="needed"))
                case {"agent": str(path)}:
                    self._leasing.private_agent(path)
        log.warning("the shim is gone; the worker ends with it")
        self._server.stop(at_once=True)

    def _released(self, assembled: Assembled) -> None:
        """Release weights and model, because another worker has all the work and this process may live on for long."""
        self._given_up.set()
        assembled.model.let_go()  # a garbage collection would do, too, but delay every stream by 0.3 s
        assembled.weights.close()
        assembled.lease.interrupt()
        log.info("all work is another replica's; the model is released")

    # --- end ------------------------------------------------------------------------------------------------------

    def _drain(self, reason: str) -> None:
        """Begin to drain, unless the drain has begun: the worker goes on serving, and gives away what it can."""
        if self._lifecycle.drain(reason):
            log.info("draining: %s", reason)
            self._line.send(state="draining")
            if self._handoffs is not None and self._lifecycle.state == "draining":
                self._handoffs.depart()

    def _end_serving(self) -> None:
        """Wait for SIGTERM, then end the serving: the drainer thread, while the main thread serves."""
        self._terminate.wait()
        self._drain("SIGTERM")
        grace = self._config.drain_grace
        end = self._end_at = time.monotonic() + self._config.drain_linger + grace
        # The platform routes new requests here until it notices the drain: they are answered, too.
        time.sleep(self._config.drain_linger)
        # Later requests are answered, too, as long as the grace has time for a request as long as the last ones.
        self._server.wait_idle(end - min(grace / 2, max(_LAST_ANSWERS, self._lifecycle.longest)))
        resumable = self._sessions is not None or self._handoffs is not None
        self._server.finish(end + 2 * _LAST_WORDS if resumable else end)
        if resumable and not self._over.wait(max(0.0, end - time.monotonic())):
            # Requests that still run end with an error that says how to resume them.
            self._cut = self._server.in_hand
            if self._handoffs is not None:
                self._handoffs.close("this replica ends", end + _LAST_WORDS)
            if self._sessions is not None:
                self._sessions.close(time.monotonic() + _LAST_WORDS)

    def _conclude(self, server: HttpServer) -> int:
        """Report the end of the worker to shim and agent, and return the exit code: the main thread, after serving."""
        if server.retired:
            self._line.send(state="retired")
        if self._exit is None and self._terminate.is_set():
            if self._sessions is not None:
                self._sessions.close(time.monotonic() + _LAST_WORDS)
            if cut := self._cut or server.in_hand:
                self._exit = DrainIncomplete(
                    f"{cut} requests had not ended {self._config.drain_grace:.0f} s after SIGTERM and were cut; "
                    "raise GLOWPLUG_DRAIN_GRACE and the platform's own grace"
                )
                log.error("%s [%s]", self._exit.text, self._exit.code)
            self._lifecycle.drained()
            self._line.send(state="drained")
        # News that agent and shim do not get now is lost with the process.
        now = time.monotonic()
        deadline = max(now + _LAST_WORDS, min(now + _REPORTS, self._end_at + _LAST_WORDS))
        if self._handoffs is not None:
            self._handoffs.close("this replica ends", deadline)
        self._reporting.close(deadline)
        return self._exit.exit_code if self._exit else 0


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
    """Run a worker that was forked from the layer `warm`, and return its exit code.

    `why` says why there was no deeper layer. `connections` are fds of connections that wait already.
    """
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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)  # the shim blocked them until there were handlers
    try:
        return Worker(config, ledger, line, terminate, warm).run(socket.socket(fileno=listen_fd), parent, accepted)
    except FunctionError as error:
        line.send(error=error.code, text=error.text)
        return error.exit_code


def log_to_stderr(level: str) -> None:
    """Log to stderr from `level` on; called again in each child of a layer.

    The handler has the level, and the logger only if it must: to set a logger's level goes through all other loggers,
    and a forked process would get a copy of every page with one.
    """
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
    """Run a worker that the shim has started, and return its exit code.

    `arguments`: fds of the listening socket and of the control line, pid of the shim, start id, the start's spans as
    JSON, fds of connections that wait already.
    """
    born = time.monotonic_ns()
    gc.disable()  # until the model is there: a start makes hardly any garbage
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
