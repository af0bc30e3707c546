"""Owns the agent's process: builds the agent from its parts, then startup, run, shutdown. Signals are only recorded."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from cache_agent import limits, logs
from cache_agent.access import control as access
from cache_agent.cluster.directory import Directory, InProcessDirectory, Node
from cache_agent.cluster.key import ClusterKey
from cache_agent.cluster.peer import Membership
from cache_agent.cluster.peers import Peers
from cache_agent.config import AgentConfig, from_environment, gone
from cache_agent.errors import AgentError, BadSetting
from cache_agent.handoff.targets import Targets
from cache_agent.serving.agent import Agent
from cache_agent.serving.connection import Connection
from cache_agent.serving.remote import RemoteConnection
from cache_agent.serving.server import Server, listen
from cache_agent.snapshots.index import cluster_key, open_index
from cache_agent.wire import link

if TYPE_CHECKING:
    from cache_agent.kube.witness import Removal, Witness
    from cache_agent.web.status import StatusServer

log = logging.getLogger("glowplug.daemon")

BAD_CONFIG = 64  # exit code after which the shim does not start a private agent again
_CLOSE_SECONDS = 2.0  # for loads to end between two reads; one that hangs in its origin is left
_PR_SET_PDEATHSIG = 1


class Daemon:
    """An agent's process; `run()` returns when the process is to end."""

    def __init__(self, config: AgentConfig, *, listening: socket.socket | None = None) -> None:
        """Build the agent. A private agent inherits its socket, `listening`; otherwise `config.socket` is bound."""
        self._config = config
        self._private = listening is not None
        self._access = access.from_config(config)
        self._witness: Witness | None = None
        if config.kubernetes and listening is None:
            from cache_agent.kube.witness import Witness  # imported late: a cold start waits for a private agent

            self._witness = Witness(config.kubernetes, config.node_name, self._on_removal)
        # A private agent uses no shared directory: functions hold no credentials for one.
        directory = _directory(config) if listening is None else InProcessDirectory()
        self._sock = listening or listen(config.socket, config.socket_mode)
        self._inode = 0 if listening else config.socket.lstat().st_ino
        self._directory = directory
        secret = None if self._private else config.cluster_key_file
        key = ClusterKey(cluster_key(secret)) if secret else None
        self._agent = Agent(config, directory, peers=_peers(config, directory, key))
        self._index = open_index(config, private=self._private)
        self._server = Server(self._agent, self._sock, self._access, index=self._index)
        if key is not None:
            me = Membership(config.node_name, config.advertised, key)
            self._server.broker.targets = Targets(me, directory)
        if config.agent_listen and not self._private:
            remote = link.listen(config.agent_listen)
            # Half of all connections stay this node's own, whoever knocks from outside.
            self._server.add_listener(remote, self._remote(key), config.max_connections // 2)
            log.info("serving %s, as %s to other nodes", config.agent_listen, config.advertised)
        self._status: StatusServer | None = None
        if config.status and not self._private:
            from cache_agent.web.status import StatusServer  # few agents need Flask and gunicorn, 0.2 s of imports

            paths = tuple(f"/{p}" for p in config.status_open)
            self._status = StatusServer(self._agent, self._access, config.status, paths)

    def _remote(self, key: ClusterKey | None) -> Callable[[socket.socket], Connection]:
        server = self._server
        return lambda sock: RemoteConnection(self._agent, sock, self._access, server.forget, server.broker, key)

    def run(self) -> None:
        self._startup()
        self._server.run()
        self._shutdown()

    def _startup(self) -> None:
        # The wakeup fd ends the server's poll even for a signal that comes just before that poll.
        signal.set_wakeup_fd(self._server.stop_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _recorded)
        # Each connection takes two fds, each model one per segment; the usual soft limit is 1024.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for text in gone(os.environ):
            log.warning("%s", text)
        where = "an inherited socket" if self._private else str(self._config.socket)
        if self._witness is not None:
            self._witness.start()
        if self._status is not None:
            self._status.start()
            log.info("metrics and events on port %d", self._status.port)
        log.info("node %s serves %s, %d MB for weights", self._agent.node, where, self._config.capacity // 10**6)

    def _on_removal(self, removal: Removal) -> None:
        count = self._agent.push_drain(f"the pod {removal.name} is being removed", removal.grace, pod=removal.uid)
        if count:
            log.info("%s is being removed; %d functions in it were told", removal.name, count)

    def _shutdown(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second signal would only cut the shutdown short
        signal.set_wakeup_fd(-1)
        self._server.close()
        if self._status is not None:
            self._status.close()
        if self._witness is not None:
            self._witness.close(1.0)
        with contextlib.suppress(OSError):
            if self._config.socket.lstat().st_ino == self._inode:  # otherwise it is a newer agent's socket
                self._config.socket.unlink()
        self._agent.close(time.monotonic() + _CLOSE_SECONDS)
        self._directory.close()
        self._index.close()
        log.info("stopped; functions keep the weights that they map")
        if threading.active_count() > 1:  # the interpreter would wait for threads that hang in an origin
            logging.shutdown()
            os._exit(0)


def _peers(config: AgentConfig, directory: Directory, key: ClusterKey | None) -> Peers | None:
    if key is None:
        if config.agent_listen:
            log.warning("there is no GLOWPLUG_CLUSTER_KEY_FILE: nodes neither give models to each other nor take them")
        return None
    if not config.agent_listen:
        log.warning("there is no GLOWPLUG_AGENT_LISTEN: this node takes models from other nodes and gives none")
    me = Membership(config.node_name, config.advertised, key)
    return Peers(me, directory, readers=config.readers, witnesses=config.peer_witnesses)


def _directory(config: AgentConfig) -> Directory:
    """Return the directory of the settings, with this node in it. Raises `BadSetting`."""
    if not config.redis_url:
        return InProcessDirectory()
    # Imported here, because redis-py takes a tenth of a second and few agents need it.
    from cache_agent.cluster.directory_redis import RedisDirectory

    directory = RedisDirectory(config.redis_url, password_file=config.redis_password_file)
    directory.heartbeat(Node(config.node_name, config.advertised, config.capacity))
    return directory


def _recorded(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the signal's byte is in the server's wakeup fd already."""


def private(fd: int, parent: int) -> None:
    """Run a private agent, which serves only its parent process, on the inherited socket `fd`.

    Neither CLI nor terminal library is imported, because a cold start waits for this process.
    """
    try:
        os.set_inheritable(fd, False)
        config = from_environment()
        logs.configure("warning", config.log_format)
        # The memory limit is shared with one function only, which needs little beside the weights.
        config = replace(config, dram=config.dram or limits.memory_limit() * 4 // 5)
        _end_with(parent)
        Daemon(config, listening=socket.socket(fileno=fd)).run()
    except AgentError as error:
        print(f"glowplug: {error.text} [{error.code}]", file=sys.stderr)
        sys.exit(BAD_CONFIG if isinstance(error, BadSetting) else 1)


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, which is all that a private agent serves."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call above
        raise SystemExit(0)


if __name__ == "__main__":
    private(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.getppid())
