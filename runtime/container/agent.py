"""The cache agent that a container asks: the configured one, the node's, or a private one. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.config import DEFAULT_SOCKET
from runtime.container.port import answers

if TYPE_CHECKING:
    from runtime.container.private_agent import PrivateAgent
    from runtime.process.children import Child


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
            from runtime.container.private_agent import PrivateAgent  # tempfile would delay a start that needs none

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
