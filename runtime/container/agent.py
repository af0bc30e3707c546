"""The cache agent that a container asks: the configured one, the node's, or a private one. Standard library only."""

from __future__ import annotations

import contextlib
import os
import socket

from runtime.config import DEFAULT_SOCKET
from runtime.container.port import answers
from runtime.process.children import Child, spawn


class ContainerAgent:
    """The choice of an agent. `path` is the socket that workers and layers connect to, "" until `find`."""

    def __init__(self, configured: str) -> None:
        self._configured = configured
        self.path = ""
        self.private: PrivateAgent | None = None

    def find(self) -> None:
        """Choose the configured agent, else the node's if that one answers, else a private one."""
        if self._configured or answers(DEFAULT_SOCKET):
            self.path = self._configured or DEFAULT_SOCKET
        else:
            self.use_private()

    def use_private(self) -> None:
        """Choose the private agent; it is started if there was none."""
        if self.private is None:
            self.private = PrivateAgent()
            self.private.start()
        self.path = self.private.path

    @property
    def process(self) -> Child | None:
        """The private agent's process, if one runs."""
        return None if self.private is None else self.private.process

    def close(self) -> None:
        if self.private is not None:
            self.private.close()


class PrivateAgent:
    """A cache agent of the container's own: the same program, on a socket for this user only.

    `process` is None while none runs; it ends with the shim.
    """

    def __init__(self) -> None:
        import tempfile  # would delay the start of a container that needs no private agent

        self._directory = tempfile.mkdtemp(prefix="glowplug-")
        self.path = os.path.join(self._directory, "agent.sock")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen(64)
        self.process: Child | None = None

    def start(self) -> None:
        """Start the agent on the socket, in which callers may wait already."""
        fd = self._socket.fileno()
        environment = {name: value for name, value in os.environ.items() if name != "GLOWPLUG_SOCKET"}
        self.process = spawn(["-P", "-m", "cache_agent.daemon", str(fd), str(os.getpid())], (fd,), environment)

    def ended(self) -> int:
        """Note that the process has ended; return its exit code."""
        assert self.process is not None, "the agent was running"
        assert self.process.status is not None, "the agent has ended"
        code = os.waitstatus_to_exitcode(self.process.status)
        self.process.close()
        self.process = None
        return code

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)
