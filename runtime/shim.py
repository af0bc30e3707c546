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
import sys
import time

_T0 = time.monotonic_ns()

import contextlib  # noqa: E402  the first line of the ledger is the first instruction
import json  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
from typing import TYPE_CHECKING, NamedTuple  # noqa: E402

from runtime.children import Child, become_subreaper, executed_at, reap, spawn  # noqa: E402
from runtime.config import DEFAULT_SOCKET, FunctionConfig, from_environment  # noqa: E402
from runtime.control import Hearing, checked_spans  # noqa: E402
from runtime.crashes import Crashes, described  # noqa: E402
from runtime.errors import BadConfig, FunctionError, WorkerCrashed  # noqa: E402
from runtime.port import answers, open_port  # noqa: E402
from runtime.wakeup import Wakeup  # noqa: E402

if TYPE_CHECKING:
    from runtime.kept import Memory
    from runtime.private_agent import PrivateAgent
    from runtime.zygote.node import Node
    from runtime.zygote.pod import Pod

_REPORTED = range(64, 70)  # exit codes of errors that the worker explained, and that would come again
_AGENT_SECONDS = 5.0
_FORK_SECONDS = 2.0  # what a zygote has to answer a request to fork
_RETIRE_AGAIN = 1.0  # seconds until an idle worker that has connections is asked again
_ORPHAN_SECONDS = 2.0  # what a dead worker's status may take to come


class _Forking(NamedTuple):
    """A worker that a zygote was asked for: the worker's end of the line is ours until it is there."""

    number: int
    line: socket.socket
    until: float


class Shim:
    """`run()` is the whole life of a container; it returns the exit code."""

    def __init__(self, config: FunctionConfig) -> None:
        self.config = config
        self.spans: list[tuple[str, str, int, int]] = [("shim", "python", executed_at(_T0), _T0)]
        self.start_id = os.urandom(8).hex()
        self._listener = open_port(config)
        self.spans.append(("shim", "listen", _T0, time.monotonic_ns()))
        self._poller = select.poll()
        self._signals = Wakeup(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        self._worker: Child | None = None
        self._dead_at = float("inf")
        self._born = False  # whether there ever was one
        self._turn = 0  # of the last load that it told
        self._line: Hearing | None = None
        self._heard = 0.0  # when it last said something
        self._crashes = Crashes()
        self._agent: PrivateAgent | None = None
        self._agent_path = ""
        self._pod: Pod | Node | None = None  # who is asked for workers
        self._forking: _Forking | None = None
        self._asked_at = 0.0  # when the worker was asked for
        self._retire_at = 0.0  # when it may be asked to retire (again)
        self._retired = self._forked = False
        self._parked = False  # no worker, on purpose
        self._kept: Memory | None = None  # weights of a worker that got them over TCP, for the next one
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
                from runtime.kept import Memory

                self._kept = Memory()
            return self.config.socket
        if answers(DEFAULT_SOCKET):
            return DEFAULT_SOCKET
        return self._private_agent().path

    def _private_agent(self) -> PrivateAgent:
        from runtime.private_agent import PrivateAgent

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

    def _find_pool(self) -> None:
        """Of the node, if there is one and it serves this container; its zygotes make the first start a fork, too."""
        if self.config.layers == "off" or not self.config.pool or not os.path.exists(self.config.pool):
            return
        start = time.monotonic_ns()
        from runtime.zygote.node import Node

        node = Node(self.config)
        if node.connect():
            self._pod = node
        else:
            self._note_unforked(f"no pool: {node.why}", start)

    def _note_unforked(self, why: str, since: int) -> None:
        """For the ledger and the log: why a worker is not forked by whom it should have been."""
        self.spans.append(("shim", why, since, time.monotonic_ns()))
        _say(why)

    def _start_worker(self, *, ahead: bool = False) -> None:
        """From the deepest layer that is there, else from the interpreter. Connections that have arrived go with it."""
        start = time.monotonic_ns()
        self._asked_at = time.monotonic()
        if self._born:  # another start, with a ledger of its own
            self.start_id, self.spans = os.urandom(8).hex(), [("shim", "restart", start, start)]
        self._born = True
        self._parked = self._retired = self._forked = False
        self._turn = 0
        ours, theirs = socket.socketpair()
        self._line = Hearing(ours, self._kept)
        self._heard = time.monotonic()
        self._poller.register(self._line, select.POLLIN)
        number = 0
        if self._pod is not None:
            number = self._pod.fork(
                time.monotonic(),
                ahead=ahead,
                listener=self._listener.fileno(),
                line=theirs.fileno(),
                connections=[each.fileno() for each in self._arrived],
                environment=dict(os.environ, GLOWPLUG_SOCKET=self._agent_path),
                start_id=self.start_id,
                spans=json.dumps(self.spans),
                cwd=os.getcwd(),
            )
        if number:
            self._forking = _Forking(number, theirs, time.monotonic() + _FORK_SECONDS)
        else:
            if self._pod is not None and self._pod.why:
                self._note_unforked(f"no pool: {self._pod.why}", start)
                self._pod.close()
                self._pod = None  # its own zygotes, from now on
            self._boot(theirs)
        self.spans.append(("shim", "spawn", start, time.monotonic_ns()))

    def _boot(self, line: socket.socket) -> None:
        with line:
            fds = [self._listener.fileno(), line.fileno(), *(each.fileno() for each in self._arrived)]
            listener, control, *connections = map(str, fds)
            arguments = [listener, control, str(os.getpid()), self.start_id, json.dumps(self.spans), *connections]
            # A SIGTERM that comes before it can take it must not kill it: requests may wait for it already.
            blocked = (signal.SIGTERM, signal.SIGINT)
            environment = dict(os.environ, GLOWPLUG_SOCKET=self._agent_path)
            self._adopt(spawn(["-P", "-m", "runtime.worker", *arguments], fds, environment, blocked))

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
            _say(f"port {self.port} is open, starting {self.config.model_uri}")
            self._agent_path = self._find_agent()
            self._find_pool()
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
        registered = [] if self._pod is None else self._pod.fds()
        if self._pod is not None:
            timeout = min(timeout, self._pod.seconds(time.monotonic()))
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
        from runtime.parked import take

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
        """Lets zygotes be built and dropped, and follows what they say about workers."""
        pod, now = self._pod, time.monotonic()
        if pod is None:
            return
        for event in pod.step(now):
            forking = self._forking
            match type(event).__name__, event:
                case "Forked", (int(number), int(pid), int(pidfd)):
                    if forking is None or number != forking.number:
                        os.close(pidfd)  # it came too late, and its line is closed: it ends by itself
                        continue
                    self._forking, self._forked = None, True
                    forking.line.close()
                    self._adopt(Child(pid, pidfd))
                case "Refused", (int(number), str(why)) if forking is not None and number == forking.number:
                    self._boot_instead(why)
                case "Ended", (int(pid), int(status)) if self._worker is not None and pid == self._worker.pid:
                    self._worker.status = status
        if self._forking is not None and now >= self._forking.until:
            self._boot_instead("the zygote did not answer")
        if self._stopping:
            return
        if self._parked and self._kept is not None and not pod.holds_model:
            self._kept.drop()  # an idle function without that layer is to be small
        if self._parked and pod.wants_worker(now):
            self._start_worker(ahead=True)
        elif self._line is not None and self._worker is not None and now >= self._retire_at and pod.wants_drop(now):
            self._retire_at = now + _RETIRE_AGAIN
            self._line.tell(retire=1)

    def _boot_instead(self, why: str) -> None:
        assert self._forking is not None, "it was to be forked"
        line, self._forking = self._forking.line, None
        now = time.monotonic_ns()
        self._note_unforked(f"not forked: {why}", now)
        self._boot(line)

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
        self._kill_at = min(self._kill_at, time.monotonic() + self.config.drain_linger + self.config.drain_grace + 5.0)
        if self._worker is not None:
            self._worker.signal(signal.SIGTERM)

    def _read_line(self) -> None:
        if self._line is None:
            return
        for message in self._line.messages():
            self._heard = time.monotonic()
            self._hear(message)
            self.spans += checked_spans(message.get("spans"))
            match message.get("error"):
                case [str(code), str(text)]:
                    _say(f"{text} [{code}]")
        if self._line.ended:
            self._close_line()

    def _close_line(self) -> None:
        if self._line is not None:
            self._poller.unregister(self._line)
            self._line.close()
            self._line = None

    def _hear(self, message: dict[str, object]) -> None:
        now = time.monotonic()
        match message:
            case {"state": "ready"}:
                self._report_ready()
                if self.config.layers != "off" and self._pod is None:
                    from runtime.zygote.pod import Pod  # not before: the first start has to do without

                    self._pod = Pod(self.config, lambda: self._agent_path, _say)
                    self._pod.memory = self._kept
                if self._pod is not None:
                    self._pod.worker_ready(str(message.get("kind", "")), now - self._asked_at, self._forked, now)
            case {"state": "retired"}:
                self._retired = True
            case {"load": [int(turn), int(inside)]} if turn > self._turn:
                self._turn = turn
                if self._pod is not None:
                    self._pod.load(inside, now)
            case {"keep": int(count)} if self._kept is not None:
                self._kept.take(count)
            case {"bytes": int(size)} if self._pod is not None:
                self._pod.worker_bytes(size)
            case {"agent": str(why)}:
                self._use_private_agent(why)

    def _report_ready(self) -> None:
        """The start in one line of the log, for whoever reads it at night."""
        total = (time.monotonic_ns() - self.spans[0][2]) / 1e6
        phases = ", ".join(f"{owner} {name} {(end - start) / 1e6:.0f}" for owner, name, start, end in self.spans)
        _say(f"ready after {total:.0f} ms ({phases})")

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
            elif now - self._dead_at > _ORPHAN_SECONDS:
                worker.status = 1 << 8  # its zygote went without telling how it ended
            return
        if now >= self._kill_at:
            _say(
                "the worker did not stop in time and is killed; raise GLOWPLUG_DRAIN_GRACE if its requests need longer"
            )
            worker.signal(signal.SIGKILL)
            self._kill_at = float("inf")
        elif now - self._heard > self.config.worker_timeout:
            _say(f"the worker was silent for {self.config.worker_timeout:.0f} s and is killed")
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
            if self._pod is not None:
                self._pod.worker_gone(time.monotonic())
            _say("the worker was idle and is gone; the next request starts another")
            return None
        if self._stopping:
            return self._verdict or (code if code >= 0 else 128 - code)
        if code in _REPORTED:
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
        if self._pod is not None:
            self._pod.close()
        agent = self._agent.process if self._agent else None
        if self._worker is not None:
            self._worker.signal(signal.SIGKILL)
        if agent is not None:
            agent.signal(signal.SIGTERM)
        while time.monotonic() < deadline and any(child.status is None for child in self._children()):
            self._poller.poll(50)
            self._signals.take()
            if self._pod is not None and self._worker is not None and self._worker.dead():
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
        os.write(2, f"glowplug: {text}\n".encode())


def main() -> int:
    try:
        return Shim(from_environment()).run()
    except FunctionError as error:
        _say(f"{error.text} [{error.code}]")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
