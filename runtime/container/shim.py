"""Owns a function container: the listening socket, the worker, and a private cache agent where the node has none.

Standard library only: until the worker runs, every import here delays it. Life: open the port, start the children,
watch them, let an idle worker go and start one for the next request, replace a crashed one, pass SIGTERM on, reap
everything, exit with the truth:

    0            SIGTERM came and every request was answered
    64 … 69      a FunctionError that a restart does not cure (see runtime/errors.py), as the worker reported it,
                 or 69 when the worker, or the private agent, crashed again and again
    70           the shim could not take over from its static twin
    71           some requests were cut by the end of the grace
    128 + N      the worker was killed by signal N while it was stopping

In node mode `shim.c`, the static twin, lives this life without an interpreter, and executes this program in its own
process when something out of the ordinary comes (takeover.py).
"""

from __future__ import annotations

import os
import time

_T0 = time.monotonic_ns()

import contextlib  # noqa: E402  the first line of the ledger is the first instruction
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from runtime.config import FunctionConfig, from_environment  # noqa: E402
from runtime.container.agent import ContainerAgent, PrivateAgent  # noqa: E402
from runtime.container.crashes import Crashes, described  # noqa: E402
from runtime.container.port import open_port  # noqa: E402
from runtime.container.supply import Order, Supply  # noqa: E402
from runtime.container.watched_worker import WatchedWorker  # noqa: E402
from runtime.errors import BadConfig, FunctionError, WorkerCrashed  # noqa: E402
from runtime.process.children import Child, become_subreaper, executed_at, reap  # noqa: E402
from runtime.process.control import ShimEnd  # noqa: E402
from runtime.process.wakeup import Wakeup  # noqa: E402

if TYPE_CHECKING:
    from runtime.container.takeover import ShimState

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
REPORTED = range(64, 70)  # exit codes of errors that the worker explained, and that would come again
_AGENT_SECONDS = 5.0  # seconds that children have to end when the shim does
_RETIRE_AGAIN = 1.0  # seconds until an idle worker that has connections is asked again
HANG_SECONDS = 5.0  # seconds beyond the grace, after which a worker that drains is killed
# Texts of the static shim, too: native.py hands them to the compiler.
SAYS_OPEN = "port %d is open, starting %s"
SAYS_READY = "ready after %.0f ms (%s)"
SAYS_STANDBY = "the worker was idle and is gone; the next request starts another"
SAYS_STUCK = "the worker did not stop in time and is killed; raise GLOWPLUG_DRAIN_GRACE if its requests need longer"
SAYS_SILENT = "the worker was silent for %.0f s and is killed"


class Shim:
    """The life of a container. On standby there is a port and no worker, on purpose."""

    def __init__(self, config: FunctionConfig, handed: ShimState | None = None) -> None:
        """`handed` is what the static twin has left, if this process was that one before. Raises `BadConfig`."""
        self.config = config
        self._handed = handed
        self.spans: list[tuple[str, str, int, int]] = [("shim", "python", executed_at(_T0), _T0)]
        self.start_id = os.urandom(8).hex()
        if handed is None:
            self._listener = open_port(config)
            self.spans.append(("shim", "listen", _T0, time.monotonic_ns()))
        else:
            self._listener = socket.socket(fileno=handed.listener)
            self.spans = handed.spans
        self._poller = select.poll()
        self._signals = Wakeup(*SIGNALS)
        if handed is not None:  # the twin has blocked the signals, so that none was lost on the way to here
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._agent = ContainerAgent(config.socket)
        self._supply = Supply(config, self._listener, lambda: self._agent.path, self._note_unforked, _say)
        self._worker: WatchedWorker | None = None  # also one that is asked for and not there yet
        self._born = False  # whether there ever was a worker
        self._standby = False
        self._arrived: list[socket.socket] = []  # connections that were accepted on standby, for the next worker
        self._crashes = Crashes()
        self._retire_at = 0.0  # when the worker may be asked to retire (again)
        self._stopping = False
        self._verdict = 0  # the exit code of a stop that no signal asked for
        self._kill_at = self._leave_at = float("inf")

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def run(self) -> int:
        """Live until the container ends; return its exit code."""
        become_subreaper()
        self._poller.register(self._signals, select.POLLIN)
        try:
            if self._handed is not None:
                self._take_over(self._handed)
            else:
                _say(SAYS_OPEN % (self.port, self.config.model_uri))
                self._agent.find()
                self._supply.find_pool()
                self._start_worker()
            while True:
                self._wait()
                self._take_signals()
                self._read_line()
                self._step_layers()
                self._reap()
                self._enforce_deadlines()
                code = self._look_at_children()
                if code is not None:
                    return code
        finally:
            self._stop_children()
            # The process that opened an inherited socket may still hold it: late requests must not wait for ever.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)

    # --- a worker's start -----------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        """Ask for a worker; connections that have arrived go with the request."""
        start = time.monotonic_ns()
        if self._born:  # another start, with a ledger of its own
            self.start_id, self.spans = os.urandom(8).hex(), [("shim", "restart", start, start)]
        self._born = True
        self._standby = False
        ours, theirs = socket.socketpair()
        self._worker = self._watched(ShimEnd(ours, self._supply.fd_store))
        child = self._supply.ask(Order(theirs, self._arrived, self.start_id, self.spans))
        if child is not None:
            self._adopt(self._worker, child)
        self.spans.append(("shim", "spawn", start, time.monotonic_ns()))

    def _watched(self, line: ShimEnd | None) -> WatchedWorker:
        return WatchedWorker(line, self._poller, self.config.worker_timeout)

    def _adopt(self, worker: WatchedWorker, child: Child) -> None:
        """Take the process of the worker that was asked for; connections that had arrived are the worker's now."""
        worker.adopt(child)
        while self._arrived:
            self._arrived.pop().close()
        if self._stopping:
            worker.signal(signal.SIGTERM)

    def _note_unforked(self, why: str, since: int) -> None:
        """Write into ledger and log why a worker is not forked by the pool or zygote that should have forked it."""
        self.spans.append(("shim", why, since, time.monotonic_ns()))
        _say(why)

    def _take_over(self, handed: ShimState) -> None:
        """Go on where the static twin left off, in the same process: port, worker and connections stay."""
        _say(f"the static shim gives way to the one in Python: {handed.why}")
        self._agent.path, self.start_id, self._born = handed.agent, handed.start_id, handed.number > 0
        self._standby = handed.parked
        if handed.arrived >= 0:
            self._arrived.append(socket.socket(fileno=handed.arrived))
        order = None
        if handed.theirs >= 0:
            order = Order(socket.socket(fileno=handed.theirs), self._arrived, self.start_id, self.spans)
        self._supply.take_over(handed, order)
        if handed.stopping:
            self._stopping, self._kill_at, self._leave_at = True, handed.kill_at, handed.leave_at
        if order is not None or handed.worker:
            line = ShimEnd(socket.socket(fileno=handed.line), unread=handed.unread) if handed.line >= 0 else None
            worker = self._worker = self._watched(line)
            worker.asked_at, worker.heard, worker.turn = handed.asked_at, handed.heard, handed.turn
            worker.retired, worker.finished = handed.retired, handed.finished
            if handed.worker:
                worker.adopt(Child(handed.worker, handed.pidfd))
        elif not self._standby:
            self._start_worker()

    # --- one turn of the loop -------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Return when something has happened, or is due; after a second at most."""
        timeout = min(1.0, self._kill_at - time.monotonic())
        layers = self._supply.layers
        registered = [] if layers is None else layers.fds()
        if layers is not None:
            timeout = min(timeout, layers.seconds(time.monotonic()))
        if self._standby:
            registered.append(self._listener.fileno())
        for fd in registered:
            self._poller.register(fd, select.POLLIN)
        try:
            ready = self._poller.poll(max(0.0, timeout) * 1000)
        finally:
            for fd in registered:
                self._poller.unregister(fd)
        if self._standby and any(fd == self._listener.fileno() for fd, _ in ready):
            self._receive()

    def _receive(self) -> None:
        """Accept a connection on standby: a probe is answered here, anything else has a worker started."""
        from runtime.container.standby import take

        connection = take(self._listener)
        if connection is not None:
            self._arrived.append(connection)
            self._start_worker()

    def _take_signals(self) -> None:
        numbers = self._signals.take()
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            if self._stopping and signal.SIGINT in numbers:
                self._kill_at = 0.0
            self._begin_stop()

    def _begin_stop(self) -> None:
        if self._stopping or not self._born:
            return
        self._stopping = True
        self._leave_at = time.monotonic() + self.config.drain_linger
        # The worker keeps to the grace itself; the deadline is for a worker that hangs.
        self._kill_at = min(self._kill_at, self._leave_at + self.config.drain_grace + HANG_SECONDS)
        if self._worker is not None:
            self._worker.signal(signal.SIGTERM)

    def _read_line(self) -> None:
        if (worker := self._worker) is None:
            return
        for message in worker.messages():
            self._hear(worker, message)
            self.spans += message.get("spans", [])
            match message:
                case {"error": str(code), "text": str(text)}:
                    _say(f"{text} [{code}]")

    def _hear(self, worker: WatchedWorker, message: dict[str, Any]) -> None:
        now, layers, fd_store = time.monotonic(), self._supply.layers, self._supply.fd_store
        match message:
            case {"state": "ready"}:
                self._report_ready()
                if (layers := self._supply.keep_layers()) is not None:
                    kind = str(message.get("kind", ""))
                    layers.worker_ready(kind, now - worker.asked_at, self._supply.forked, now)
            case {"load": int(inside), "turn": int(turn)} if turn > worker.turn and inside >= 0:
                worker.turn = turn
                if layers is not None:
                    layers.load(inside, now)
            case {"keep": int(count)} if fd_store is not None:
                fd_store.take(count)
            case {"bytes": int(size)} if layers is not None:
                layers.worker_bytes(size)
            case {"agent": str(why)}:  # the worker cannot understand the agent; what starts after it could not either
                _say(f"{why}; a private cache agent is asked instead")
                self._agent.use_private()
                worker.tell(agent=self._agent.path)

    def _report_ready(self) -> None:
        """Write the start into the log, in one line."""
        total = (time.monotonic_ns() - self.spans[0][2]) / 1e6
        phases = ", ".join(f"{owner} {name} {(end - start) / 1e6:.0f}" for owner, name, start, end in self.spans)
        _say(SAYS_READY % (total, phases))

    def _step_layers(self) -> None:
        """Take the worker that has come, or the word of how one ended, and do what the layers want of the worker."""
        now, worker = time.monotonic(), self._worker
        for event in self._supply.step(now):
            if isinstance(event, Child):
                assert worker is not None, "a worker was asked for"
                self._adopt(worker, event)
            elif worker is not None and worker.child is not None and event.pid == worker.child.pid:
                worker.child.status = event.status
        layers, fd_store = self._supply.layers, self._supply.fd_store
        if layers is None or self._stopping:
            return
        if self._standby and fd_store is not None and not layers.holds_model:
            fd_store.drop()  # an idle function without a model layer is to be small
        if worker is not None and worker.reachable and now >= self._retire_at and layers.wants_drop(now):
            self._retire_at = now + _RETIRE_AGAIN
            worker.tell(retire=1)

    def _reap(self) -> None:
        for pid, status in reap().items():
            for child in self._children():
                if child.pid == pid:
                    child.status = status

    def _children(self) -> list[Child]:
        worker = None if self._worker is None else self._worker.child
        return [each for each in (worker, self._agent.process) if each is not None]

    def _enforce_deadlines(self) -> None:
        """Kill a worker that does not stop in time, or is silent."""
        now, worker = time.monotonic(), self._worker
        if worker is None or not worker.runs(now):
            return
        if now >= self._kill_at:
            _say(SAYS_STUCK)
            worker.signal(signal.SIGKILL)
            self._kill_at = float("inf")
        elif worker.silent(now):
            _say(SAYS_SILENT % self.config.worker_timeout)
            worker.signal(signal.SIGKILL)

    # --- ends of children -----------------------------------------------------------------------------------------

    def _look_at_children(self) -> int | None:
        """Do what the end of a child demands; return the exit code, if the container ends with it."""
        if self._worker is not None and self._worker.status is not None:
            code = self._worker_ended(self._worker, self._worker.status)
            if code is not None:
                return code
        private = self._agent.private
        if private is not None and private.process is not None and private.process.status is not None:
            self._agent_ended(private)
        if self._standby and self._stopping and time.monotonic() >= self._leave_at:
            return self._verdict
        return None

    def _worker_ended(self, worker: WatchedWorker, status: int) -> int | None:
        """Go on standby, start another worker, or return the exit code."""
        self._read_line()
        worker.close()
        self._worker = None
        code = os.waitstatus_to_exitcode(status)
        if worker.retired and code == 0:
            self._standby = True
            if self._supply.layers is not None:
                self._supply.layers.worker_gone(time.monotonic())
            _say(SAYS_STANDBY)
            return None
        if self._stopping:
            return self._verdict or (code if code >= 0 else 128 - code)
        if code in REPORTED:
            return code
        what = described(code)
        if times := self._crashes.too_many(time.monotonic()):
            _say(f"the worker {what}, the {times}th time within a minute: giving up [worker_crashed]")
            return WorkerCrashed.exit_code
        _say(f"the worker {what}; starting another")
        self._start_worker()
        return None

    def _agent_ended(self, agent: PrivateAgent) -> None:
        """Start the private agent again, or begin to stop."""
        code = agent.ended()
        if self._stopping:
            return
        if code == BadConfig.exit_code:  # the agent has said why, and would say the same again
            self._verdict = code
            self._begin_stop()
            return
        if self._crashes.too_many(time.monotonic()):
            _say("the private cache agent ends again and again: giving up [worker_crashed]")
            self._verdict = WorkerCrashed.exit_code
            self._begin_stop()
            return
        _say(f"the private cache agent ended ({code}); starting another")
        agent.start()

    def _stop_children(self) -> None:
        deadline = time.monotonic() + _AGENT_SECONDS
        self._supply.close()
        agent, worker = self._agent.process, None if self._worker is None else self._worker.child
        if worker is not None:
            worker.signal(signal.SIGKILL)
        if agent is not None:
            agent.signal(signal.SIGTERM)
        while time.monotonic() < deadline and any(child.status is None for child in self._children()):
            self._poller.poll(50)
            self._signals.take()
            if self._supply.layers is not None and worker is not None and worker.dead():
                break  # a forked worker's status was its zygote's to tell
            self._reap()
        if agent is not None:
            agent.signal(signal.SIGKILL)
        self._agent.close()
        self._reap()
        self._signals.close()


def _say(text: str) -> None:
    # One write: lines of several processes share this stream.
    with contextlib.suppress(OSError):
        os.write(2, f"glowplug: {text}\n".encode("utf-8", "backslashreplace"))


def _handed() -> ShimState | None:
    if "GLOWPLUG_SHIM_STATE" not in os.environ:
        return None
    from runtime.container.takeover import handed

    return handed()


def main() -> int:
    """Run the shim; return the exit code, also of a `FunctionError` before the port is open."""
    try:
        return Shim(from_environment(), _handed()).run()
    except FunctionError as error:
        _say(f"{error.text} [{error.code}]")
        return error.exit_code
