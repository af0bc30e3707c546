"""Owns a function container: the listening socket, the worker, and a private cache agent where the node has none.

Standard library only: until the worker runs, every import here delays it. Life: open the port, start the children,
watch them, replace a crashed worker, pass SIGTERM on, reap everything, exit with the truth:

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

from runtime.config import DEFAULT_SOCKET, FunctionConfig, from_environment  # noqa: E402
from runtime.control import Lines, checked_spans  # noqa: E402
from runtime.errors import BadConfig, FunctionError, WorkerCrashed  # noqa: E402

_BACKLOG = 1024
_CRASHES, _CRASH_WINDOW = 3, 60.0
_REPORTED = range(64, 70)  # exit codes of errors that the worker explained, and that would come again
_AGENT_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36


class Child:
    """A process of ours: pid, pidfd, and since when it runs."""

    def __init__(
        self, arguments: list[str], fds: tuple[int, ...], environment: dict[str, str], blocked: tuple[int, ...] = ()
    ) -> None:
        """`fds` are inherited under their own numbers; everything else is close-on-exec. Signals that are `blocked`
        wait until the process takes them."""
        for fd in fds:
            os.set_inheritable(fd, True)
        try:
            command = [sys.executable, *arguments]
            self.pid = os.posix_spawn(sys.executable, command, environment, setsigmask=blocked)
        finally:
            for fd in fds:
                os.set_inheritable(fd, False)
        self.pidfd = os.pidfd_open(self.pid)
        self.status: int | None = None  # of waitpid, once it has ended

    def signal(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        os.close(self.pidfd)


class Shim:
    """`run()` is the whole life of a container; it returns the exit code."""

    def __init__(self, config: FunctionConfig) -> None:
        self.config = config
        self.spans: list[tuple[str, str, int, int]] = [("shim", "python", _exec_time(), _T0)]
        self.start_id = os.urandom(8).hex()
        self._listener = self._open_port()
        self._poller = select.poll()
        self._wake, wake = socket.socketpair()
        for end in (self._wake, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._wake_end = wake
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)  # the wakeup fd records them
        self._worker: Child | None = None
        self._line: socket.socket | None = None
        self._lines = Lines()
        self._heard = 0.0
        self._crashes: list[float] = []
        self._agent: Child | None = None
        self._agent_path = ""
        self._agent_socket: socket.socket | None = None
        self._agent_directory = ""
        self._stopping = False
        self._verdict = 0  # the exit code of a stop that nobody asked for
        self._kill_at = float("inf")

    # --- startup --------------------------------------------------------------------------------------------------

    def _open_port(self) -> socket.socket:
        if self.config.listen_fd >= 0:
            return self._take_port(self.config.listen_fd)
        listener = socket.socket(socket.AF_INET6 if ":" in self.config.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.config.host, self.config.port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise BadConfig(
                f"cannot listen on {self.config.host}:{self.config.port}: {error.strerror}; set PORT to another port"
            ) from error
        self.spans.append(("shim", "listen", _T0, time.monotonic_ns()))
        return listener

    def _take_port(self, fd: int) -> socket.socket:
        """A socket that was opened before this process began, so that requests wait for it from the first instant."""
        try:
            listener = socket.socket(fileno=fd)
            listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise BadConfig(f"GLOWPLUG_LISTEN_FD is {fd}, which is no open socket ({error.strerror})") from error
        if not listening:
            raise BadConfig(f"GLOWPLUG_LISTEN_FD is {fd}, a socket that does not listen")
        listener.set_inheritable(False)
        return listener

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _find_agent(self) -> str:
        """The agent's socket: as configured, the node's if one answers, else that of a private agent."""
        if self.config.socket:
            return self.config.socket
        if os.path.exists(DEFAULT_SOCKET):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                with contextlib.suppress(OSError):
                    probe.connect(DEFAULT_SOCKET)
                    return DEFAULT_SOCKET
        import tempfile

        self._agent_directory = tempfile.mkdtemp(prefix="glowplug-")
        path = os.path.join(self._agent_directory, "agent.sock")
        self._agent_socket = socket.socket(socket.AF_UNIX)
        self._agent_socket.bind(path)
        self._agent_socket.listen(64)
        self._start_agent()
        return path

    def _start_agent(self) -> None:
        assert self._agent_socket is not None, "only a private agent is started here"
        fd = self._agent_socket.fileno()
        environment = {name: value for name, value in os.environ.items() if name != "GLOWPLUG_SOCKET"}
        self._agent = Child(["-P", "-m", "cache_agent.daemon", str(fd), str(os.getpid())], (fd,), environment)

    def _start_worker(self) -> None:
        start = time.monotonic_ns()
        if self._crashes:  # another start, with a ledger of its own
            self.start_id, self.spans = os.urandom(8).hex(), [("shim", "restart", start, start)]
        ours, theirs = socket.socketpair()
        with theirs:
            environment = dict(os.environ, GLOWPLUG_SOCKET=self._agent_path)
            spans = json.dumps(self.spans)
            arguments = [str(self._listener.fileno()), str(theirs.fileno()), str(os.getpid()), self.start_id, spans]
            fds = (self._listener.fileno(), theirs.fileno())
            # A SIGTERM that comes before it can take it must not kill it: requests may wait for it already.
            blocked = (signal.SIGTERM, signal.SIGINT)
            self._worker = Child(["-P", "-m", "runtime.worker", *arguments], fds, environment, blocked)
        ours.setblocking(False)
        self._line, self._lines = ours, Lines()
        self._heard = time.monotonic()
        self._poller.register(ours, select.POLLIN)
        self._poller.register(self._worker.pidfd, select.POLLIN)
        self.spans.append(("shim", "spawn", start, time.monotonic_ns()))

    # --- running --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        _become_subreaper()
        self._poller.register(self._wake, select.POLLIN)
        try:
            _say(f"port {self.port} is open, starting {self.config.model_uri}")
            self._agent_path = self._find_agent()
            self._start_worker()
            while True:
                timeout = min(1.0, self._kill_at - time.monotonic())
                self._poller.poll(max(0.0, timeout) * 1000)
                self._take_signals()
                self._read_line()
                self._reap()
                self._enforce_deadlines()
                if self._worker is not None and self._worker.status is not None:
                    code = self._worker_ended(self._worker.status)
                    if code is not None:
                        return code
                if self._agent is not None and self._agent.status is not None:
                    self._agent_ended(self._agent.status)
        finally:
            self._stop_children()
            # Whoever opened an inherited socket may still hold it: late requests must not wait on it for ever.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)

    def _take_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = self._wake.recv(4096)
            if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                if self._stopping and signal.SIGINT in numbers:
                    self._kill_at = 0.0
                self._begin_stop()

    def _begin_stop(self) -> None:
        if self._stopping or self._worker is None:
            return
        self._stopping = True
        # The worker keeps to the grace itself; this is for one that hangs.
        self._kill_at = min(self._kill_at, time.monotonic() + self.config.drain_linger + self.config.drain_grace + 5.0)
        self._worker.signal(signal.SIGTERM)

    def _read_line(self) -> None:
        if self._line is None:
            return
        try:
            data = self._line.recv(64 << 10)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._poller.unregister(self._line)
            self._line.close()
            self._line = None
            return
        self._heard = time.monotonic()
        for message in self._lines.feed(data):
            if message.get("state") == "ready":
                self._report_ready()
            self.spans += checked_spans(message.get("spans"))
            match message.get("error"):
                case [str(code), str(text)]:
                    _say(f"{text} [{code}]")

    def _report_ready(self) -> None:
        """The start in one line of the log, for whoever reads it at night."""
        total = (time.monotonic_ns() - self.spans[0][2]) / 1e6
        phases = ", ".join(f"{owner} {name} {(end - start) / 1e6:.0f}" for owner, name, start, end in self.spans)
        _say(f"ready after {total:.0f} ms ({phases})")

    def _reap(self) -> None:
        """Also of processes that user code left behind: as pid 1 or subreaper they are ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in (self._worker, self._agent):
                if child is not None and child.pid == pid:
                    child.status = status

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        worker = self._worker
        if worker is None or worker.status is not None:
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
        self._poller.unregister(self._worker.pidfd)
        self._worker.close()
        self._worker = None
        if self._line is not None:
            self._poller.unregister(self._line)
            self._line.close()
            self._line = None
        code = os.waitstatus_to_exitcode(status)
        if self._stopping:
            return self._verdict or (code if code >= 0 else 128 - code)
        if code in _REPORTED:
            return code
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if code == -signal.SIGSEGV:
            what += (
                " (if its code writes into the model's weights: they are shared and read-only; set "
                "GLOWPLUG_PRIVATE_WEIGHTS=1 for a copy of its own)"
            )
        if code == -signal.SIGKILL:
            what += " (if nobody sent it, the container's memory limit is too small)"
        now = time.monotonic()
        self._crashes = [at for at in self._crashes if now - at < _CRASH_WINDOW] + [now]
        if len(self._crashes) > _CRASHES:
            _say(f"the worker {what}, the {len(self._crashes)}th time within a minute: giving up [worker_crashed]")
            return WorkerCrashed.exit_code
        _say(f"the worker {what}; starting another")
        self._start_worker()
        return None

    def _agent_ended(self, status: int) -> None:
        assert self._agent is not None, "it has just ended"
        self._agent.close()
        self._agent = None
        if self._stopping:
            return
        code = os.waitstatus_to_exitcode(status)
        if code == BadConfig.exit_code:  # it has said why, and would say it again
            self._verdict = code
            self._begin_stop()
            return
        now = time.monotonic()
        self._crashes = [at for at in self._crashes if now - at < _CRASH_WINDOW] + [now]
        if len(self._crashes) > _CRASHES:
            _say("the private cache agent ends again and again: giving up [worker_crashed]")
            self._verdict = WorkerCrashed.exit_code
            self._begin_stop()
            return
        _say(f"the private cache agent ended ({code}); starting another")
        self._start_agent()

    # --- shutdown -------------------------------------------------------------------------------------------------

    def _stop_children(self) -> None:
        deadline = time.monotonic() + _AGENT_SECONDS
        for child, number in ((self._worker, signal.SIGKILL), (self._agent, signal.SIGTERM)):
            if child is not None:
                child.signal(number)
        while time.monotonic() < deadline and any(c and c.status is None for c in (self._worker, self._agent)):
            self._poller.poll(50)
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
            self._reap()
        if self._agent is not None:
            self._agent.signal(signal.SIGKILL)
        if self._agent_directory:
            with contextlib.suppress(OSError):
                os.unlink(self._agent_path)
            with contextlib.suppress(OSError):
                os.rmdir(self._agent_directory)


def _exec_time() -> int:
    """When this process was executed, in ns of CLOCK_MONOTONIC, to the kernel's clock tick (10 ms)."""
    with open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rpartition(") ")[2].split()[19])
    since_boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return min(_T0, ticks * 10**9 // os.sysconf("SC_CLK_TCK") - since_boot)


def _become_subreaper() -> None:
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


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
