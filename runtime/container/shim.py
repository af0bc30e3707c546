"""Owns a function container: the listening socket, the worker, and a private cache agent where the node has none.

Standard library only: until the worker runs, every import here delays it. Life: open the port, start the children,
watch them, let an idle worker go and start one for the next request, replace a crashed one, pass SIGTERM on, reap
everything, exit with the truth:

    0            SIGTERM came and every request was answered
    64 … 69      a FunctionError that a restart does not cure (see errors.py), as the worker reported it,
                 or 69 when the worker, or the private agent, crashed again and again
    128 + N      the worker was killed by signal N while it was stopping
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

from runtime.config import DEFAULT_SOCKET, FunctionConfig, from_environment  # noqa: E402
from runtime.container.port import answers, open_port  # noqa: E402
from runtime.container.supply import Order, Supply  # noqa: E402
from runtime.errors import BadConfig, FunctionError, WorkerCrashed  # noqa: E402
from runtime.process.children import Child, become_subreaper, executed_at, reap  # noqa: E402
from runtime.process.control import Hearing  # noqa: E402
from runtime.process.crashes import Crashes, described  # noqa: E402
from runtime.process.wakeup import Wakeup  # noqa: E402

if TYPE_CHECKING:
    from runtime.container.private_agent import PrivateAgent
    from runtime.container.takeover import ShimState
    from runtime.process.fd_store import FdStore

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
REPORTED = range(64, 70)  # exit codes of errors that the worker explained, and that would come again
_AGENT_SECONDS = 5.0
_RETIRE_AGAIN = 1.0  # seconds until an idle worker that has connections is asked again
ORPHAN_SECONDS = 2.0  # what a dead worker's status may take to come
HANG_SECONDS = 5.0  # beyond the grace, after which a worker that drains is killed
# Texts of the static shim, too; see zygote/native.py.
SAYS_OPEN = "port %d is open, starting %s"
SAYS_READY = "ready after %.0f ms (%s)"
SAYS_PARKED = "the worker was idle and is gone; the next request starts another"
SAYS_STUCK = "the worker did not stop in time and is killed; raise GLOWPLUG_DRAIN_GRACE if its requests need longer"
SAYS_SILENT = "the worker was silent for %.0f s and is killed"


class Shim:
    """`run()` is the whole life of a container; it returns the exit code."""

    def __init__(self, config: FunctionConfig, handed: ShimState | None = None) -> None:
        """`handed` is what the static twin has left, if it was here before."""
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
        if handed is not None:  # it has blocked them, so that none is lost between it and us
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._worker: Child | None = None
        self._dead_at = float("inf")
        self._born = False  # whether there ever was one
        self._turn = 0  # of the last load that it told
        self._line: Hearing | None = None
        self._heard = 0.0  # when it last said something
        self._crashes = Crashes()
        self._agent: PrivateAgent | None = None
        self._agent_path = ""
        self._supply = Supply(config, self._listener, lambda: self._agent_path, self._note_unforked, _say)
        self._asked_at = 0.0  # when the worker was asked for
        self._retire_at = 0.0  # when it may be asked to retire (again)
        self._retired = self._finished = False
        self._parked = False  # no worker, on purpose
        self._kept: FdStore | None = None  # weights of a worker that got them over TCP, for the next one
        self._arrived: list[socket.socket] = []  # connections that were taken while parked, for the next worker
        self._stopping = False
        self._verdict = 0  # the exit code of a stop that nobody asked for
        self._kill_at = self._leave_at = float("inf")

    # --- startup --------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _find_agent(self) -> str:
        """The agent's socket: as configured, the node's if one answers, else that of a private agent."""
        if self.config.socket:
            if self.config.socket.startswith("tcp:"):
                from runtime.process.fd_store import FdStore

                self._kept = self._supply.memory = FdStore()
            return self.config.socket
        if answers(DEFAULT_SOCKET):
            return DEFAULT_SOCKET
        return self._private_agent().path

    def _private_agent(self) -> PrivateAgent:
        from runtime.container.private_agent import PrivateAgent

        if self._agent is None:
            self._agent = PrivateAgent()
            self._agent.start()
        return self._agent

    def _use_private_agent(self, why: str) -> None:
        """For the worker, which cannot understand the one that is there, and for whatever is started after it."""
        _say(f"{why}; a private cache agent is asked instead")
        self._agent_path = self._private_agent().path
        if self._line is not None:
            self._line.tell(agent=self._agent_path)

    def _note_unforked(self, why: str, since: int) -> None:
        """For the ledger and the log: why a worker is not forked by whom it should have been."""
        self.spans.append(("shim", why, since, time.monotonic_ns()))
        _say(why)

    def _start_worker(self) -> None:
        """From the deepest layer that is there, else from the interpreter. Connections that have arrived go with it."""
        start = time.monotonic_ns()
        self._asked_at = time.monotonic()
        if self._born:  # another start, with a ledger of its own
            self.start_id, self.spans = os.urandom(8).hex(), [("shim", "restart", start, start)]
        self._born = True
        self._parked = self._retired = self._finished = False
        self._turn = 0
        ours, theirs = socket.socketpair()
        self._listen_to(Hearing(ours, self._kept))
        worker = self._supply.ask(Order(theirs, self._arrived, self.start_id, self.spans))
        if worker is not None:
            self._adopt(worker)
        self.spans.append(("shim", "spawn", start, time.monotonic_ns()))

    def _listen_to(self, line: Hearing) -> None:
        self._line, self._heard = line, time.monotonic()
        self._poller.register(line, select.POLLIN)

    def _take_over(self, handed: ShimState) -> None:
        """From the static twin, which was this process until now: nobody has noticed."""
        _say(f"the static shim gives way to the one in Python: {handed.why}")
        self._agent_path, self.start_id, self._born = handed.agent, handed.start_id, handed.number > 0
        self._turn, self._parked = handed.turn, handed.parked
        self._retired, self._finished = handed.retired, handed.finished
        self._asked_at = handed.asked_at
        if handed.arrived >= 0:
            self._arrived.append(socket.socket(fileno=handed.arrived))
        order = None
        if handed.theirs >= 0:
            order = Order(socket.socket(fileno=handed.theirs), self._arrived, self.start_id, self.spans)
        self._supply.take_over(handed, order)
        if handed.line >= 0:
            self._listen_to(Hearing(socket.socket(fileno=handed.line), unread=handed.unread))
        self._heard = handed.heard
        if handed.stopping:
            self._stopping, self._kill_at, self._leave_at = True, handed.kill_at, handed.leave_at
        if handed.worker:
            self._worker = Child(handed.worker, handed.pidfd)
            self._poller.register(handed.pidfd, select.POLLIN)
        elif order is None and not handed.parked:
            self._start_worker()

    def _adopt(self, worker: Child) -> None:
        """It is there, and has the connections now."""
        self._worker, self._dead_at = worker, float("inf")
        self._poller.register(worker.pidfd, select.POLLIN)
        while self._arrived:
            self._arrived.pop().close()
        if self._stopping:
            worker.signal(signal.SIGTERM)

    # --- running --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        become_subreaper()
        self._poller.register(self._signals, select.POLLIN)
        try:
            if self._handed is not None:
                self._take_over(self._handed)
            else:
                _say(SAYS_OPEN % (self.port, self.config.model_uri))
                self._agent_path = self._find_agent()
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
            # Whoever opened an inherited socket may still hold it: late requests must not wait on it for ever.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)

    def _wait(self) -> None:
        """Until something happens, or is due."""
        timeout = min(1.0, self._kill_at - time.monotonic())
        layers = self._supply.layers
        registered = [] if layers is None else layers.fds()
        if layers is not None:
            timeout = min(timeout, layers.seconds(time.monotonic()))
        for fd in registered:
            self._poller.register(fd, select.POLLIN)
        if self._parked:
            self._poller.register(self._listener, select.POLLIN)
        try:
            ready = self._poller.poll(max(0.0, timeout) * 1000)
        finally:
            for fd in registered:
                self._poller.unregister(fd)
            if self._parked:
                self._poller.unregister(self._listener)
        if self._parked and any(fd == self._listener.fileno() for fd, _ in ready):
            self._receive()

    def _receive(self) -> None:
        """A connection waits and no worker is there: probes are answered here, whatever else needs a worker."""
        from runtime.container.standby import take

        connection = take(self._listener)
        if connection is not None:
            self._arrived.append(connection)
            self._start_worker()

    def _look_at_children(self) -> int | None:
        """What became of those that have ended; the exit code, if that ends the container."""
        if self._worker is not None and self._worker.status is not None:
            code = self._worker_ended(self._worker.status)
            if code is not None:
                return code
        if self._agent and self._agent.process is not None and self._agent.process.status is not None:
            self._agent_ended(self._agent)
        if self._parked and self._stopping and time.monotonic() >= self._leave_at:
            return self._verdict
        return None

    def _step_layers(self) -> None:
        """Takes the worker that has come, or the word of how it ended, and does what its layers want of it."""
        now = time.monotonic()
        for event in self._supply.step(now):
            if isinstance(event, Child):
                self._adopt(event)
            elif self._worker is not None and event.pid == self._worker.pid:
                self._worker.status = event.status
        layers = self._supply.layers
        if layers is None or self._stopping:
            return
        if self._parked and self._kept is not None and not layers.holds_model:
            self._kept.drop()  # an idle function without that layer is to be small
        if self._line is not None and self._worker is not None and now >= self._retire_at and layers.wants_drop(now):
            self._retire_at = now + _RETIRE_AGAIN
            self._line.tell(retire=1)

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
        # The worker keeps to the grace itself; this is for one that hangs.
        self._kill_at = min(self._kill_at, self._leave_at + self.config.drain_grace + HANG_SECONDS)
        if self._worker is not None:
            self._worker.signal(signal.SIGTERM)

    def _read_line(self) -> None:
        if self._line is None:
            return
        for message in self._line.messages():
            self._heard = time.monotonic()
            self._hear(message)
            self.spans += message.get("spans", [])
            match message:
                case {"error": str(code), "text": str(text)}:
                    _say(f"{text} [{code}]")
        if self._line.ended:
            self._close_line()

    def _close_line(self) -> None:
        if self._line is not None:
            self._poller.unregister(self._line)
            self._line.close()
            self._line = None

    def _hear(self, message: dict[str, Any]) -> None:
        now, layers = time.monotonic(), self._supply.layers
        match message:
            case {"state": "ready"}:
                self._report_ready()
                if (layers := self._supply.keep_layers()) is not None:
                    kind = str(message.get("kind", ""))
                    layers.worker_ready(kind, now - self._asked_at, self._supply.forked, now)
            case {"state": "retired"}:
                self._retired = self._finished = True
            case {"state": "drained"}:
                self._finished = True
            case {"load": int(inside), "turn": int(turn)} if turn > self._turn and inside >= 0:
                self._turn = turn
                if layers is not None:
                    layers.load(inside, now)
            case {"keep": int(count)} if self._kept is not None:
                self._kept.take(count)
            case {"bytes": int(size)} if layers is not None:
                layers.worker_bytes(size)
            case {"agent": str(why)}:
                self._use_private_agent(why)

    def _report_ready(self) -> None:
        """The start in one line of the log, for whoever reads it at night."""
        total = (time.monotonic_ns() - self.spans[0][2]) / 1e6
        phases = ", ".join(f"{owner} {name} {(end - start) / 1e6:.0f}" for owner, name, start, end in self.spans)
        _say(SAYS_READY % (total, phases))

    def _reap(self) -> None:
        for pid, status in reap().items():
            for child in self._children():
                if child.pid == pid:
                    child.status = status

    def _children(self) -> list[Child]:
        agent = self._agent.process if self._agent else None
        return [each for each in (self._worker, agent) if each is not None]

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        worker = self._worker
        if worker is None or worker.status is not None:
            return
        if worker.dead():
            if self._dead_at > now:
                self._dead_at = now
                self._poller.unregister(worker.pidfd)
            elif now - self._dead_at > ORPHAN_SECONDS:
                worker.status = 0 if self._finished else 1 << 8  # its zygote went without telling how it ended
            return
        if now >= self._kill_at:
            _say(SAYS_STUCK)
            worker.signal(signal.SIGKILL)
            self._kill_at = float("inf")
        elif now - self._heard > self.config.worker_timeout:
            _say(SAYS_SILENT % self.config.worker_timeout)
            worker.signal(signal.SIGKILL)
            self._heard = now

    def _worker_ended(self, status: int) -> int | None:
        """The exit code, or None when a new worker was started."""
        assert self._worker is not None, "it has just ended"
        self._read_line()
        self._close_line()
        with contextlib.suppress(KeyError):
            self._poller.unregister(self._worker.pidfd)
        self._worker.close()
        self._worker = None
        code = os.waitstatus_to_exitcode(status)
        if self._retired and code == 0:
            self._parked = True
            if self._supply.layers is not None:
                self._supply.layers.worker_gone(time.monotonic())
            _say(SAYS_PARKED)
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
        code = agent.ended()
        if self._stopping:
            return
        if code == BadConfig.exit_code:  # it has said why, and would say it again
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

    # --- shutdown -------------------------------------------------------------------------------------------------

    def _stop_children(self) -> None:
        deadline = time.monotonic() + _AGENT_SECONDS
        self._supply.close()
        agent = self._agent.process if self._agent else None
        if self._worker is not None:
            self._worker.signal(signal.SIGKILL)
        if agent is not None:
            agent.signal(signal.SIGTERM)
        while time.monotonic() < deadline and any(child.status is None for child in self._children()):
            self._poller.poll(50)
            self._signals.take()
            if self._supply.layers is not None and self._worker is not None and self._worker.dead():
                break  # how it ended was its zygote's to tell
            self._reap()
        if agent is not None:
            agent.signal(signal.SIGKILL)
        if self._agent is not None:
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
    try:
        return Shim(from_environment(), _handed()).run()
    except FunctionError as error:
        _say(f"{error.text} [{error.code}]")
        return error.exit_code
