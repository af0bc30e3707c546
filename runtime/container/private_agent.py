"""Owns the cache agent of a container whose node has none: the same program, on a socket for this user only.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile

from runtime.process.children import Child, spawn


class PrivateAgent:
    """A cache agent of the container's own. `process` is None while none runs; it ends with the shim."""

    def __init__(self) -> None:
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
