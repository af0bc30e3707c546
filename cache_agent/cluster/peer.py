"""Owns the connections to one other node's agent: fetching chunks, following a source, reading its description."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cache_agent.cluster.key import ClusterKey, nonce
from cache_agent.errors import AccessDenied, AgentTimeout, AgentUnreachable, ProtocolError, from_wire
from cache_agent.model import content
from cache_agent.model.checkpoint import Description, decode_description
from cache_agent.model.manifest import LAYOUT, MAX_MANIFEST
from cache_agent.wire.channel import Disconnected
from cache_agent.wire.link import Link, dial
from cache_agent.wire.messages import Challenge, ChallengeAnswer, ErrorReply, Hello, Identity, Welcome
from cache_agent.wire.peers import Chunk, Described, DescribeRequest, FetchRequest, FollowRequest, Holds
from cache_agent.wire.protocol import VERSION

log = logging.getLogger("glowplug.peers")

_CONNECT_SECONDS = 3.0
_PATIENCE = 5.0  # seconds without a byte, or without a message of a peer that sends one every second
_IDLE = 4  # connections kept for reuse, to one peer


class PeerFailed(Exception):
    """A peer did not give the requested data; the text says why."""


class PeerLied(PeerFailed):
    """A peer gave other data than it stated, or an answer against the protocol."""


class Membership(NamedTuple):
    """This node's name and address as other nodes see them, and the cluster's key."""

    node: str
    address: str
    key: ClusterKey


class Peer:
    """One other agent. Any thread; each call uses a connection of its own, which is kept for reuse."""

    def __init__(self, name: str, address: str, me: Membership) -> None:
        self.name = name
        self.address = address
        self._me = me
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._following: Link | None = None
        self._closed = False

    def fetch(self, source: str, number: int, view: memoryview) -> str:
        """Fill `view` with a chunk, and return the digest of the bytes received. Raises `PeerFailed`."""
        with self._link() as link:
            link.send(FetchRequest(source, number, LAYOUT))
            reply, _ = link.receive(time.monotonic() + _PATIENCE)
            if isinstance(reply, ErrorReply):
                raise PeerFailed(reply.text)
            if not isinstance(reply, Chunk) or reply.body != len(view):
                raise PeerLied(f"it was asked for {len(view)} bytes and announced {getattr(reply, 'body', 0)}")
            link.read_into(view, _PATIENCE)
        digest = content.chunk_digest(view)
        if reply.digest and reply.digest != digest:
            raise PeerLied("the bytes are not what it says they are")
        return digest

    def describe(self, source: str) -> Description:
        """Return the description of a source. Raises `PeerFailed`, or `BadCheckpoint`."""
        with self._link() as link:
            link.send(DescribeRequest(source))
            reply, _ = link.receive(time.monotonic() + _PATIENCE)
            if isinstance(reply, ErrorReply):
                raise PeerFailed(reply.text)
            if not isinstance(reply, Described) or reply.body > MAX_MANIFEST:
                raise PeerLied("it gave no description")
            data = link.read(reply.body, _PATIENCE)
        found = decode_description(data)
        if found.source.id != source:
            raise PeerLied("it described another source")
        return found

    def follow(self, source: str, receive: Callable[[Holds], None]) -> None:
        """Call `receive` with each message about a source until the peer ends or is silent, or until `close`.

        Raises `PeerFailed`.
        """
        with self._link() as link:
            with self._lock:
                if self._closed:
                    return
                self._following = link
            try:
                link.send(FollowRequest(source))
                while True:
                    message, _ = link.receive(time.monotonic() + _PATIENCE)
                    if isinstance(message, ErrorReply):
                        raise PeerFailed(message.text)
                    if not isinstance(message, Holds):
                        raise PeerLied("it answered out of turn")
                    receive(message)
            finally:
                with self._lock:
                    self._following = None

    @contextlib.contextmanager
    def _link(self) -> Iterator[Link]:
        """Lend a connection, kept for reuse after success. Every failure becomes `PeerFailed`."""
        with self._lock:
            link = self._idle.pop() if self._idle else None
        if link is not None and not link.is_quiet:  # the peer has closed it
            link.close()
            link = None
        try:
            if link is None:
                link = dial_peer(self.address, self._me.key, self._me.node, self._me.address, _CONNECT_SECONDS)
            yield link
        except (Disconnected, AgentTimeout, AgentUnreachable, AccessDenied) as error:
            raise PeerFailed(str(error)) from error
        except ProtocolError as error:
            raise PeerLied(str(error)) from error
        else:
            with self._lock:
                if not self._closed and link.state == "peer" and len(self._idle) < _IDLE:
                    self._idle.append(link)
                    link = None
        finally:
            if link is not None:
                link.close()

    def close(self) -> None:
        """Close all connections; a `follow` under way fails at once."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            following = self._following
        for link in idle:
            link.close()
        if following is not None:
            following.interrupt()


def dial_peer(address: str, key: ClusterKey, node: str, own_address: str, timeout: float) -> Link:
    """Connect to another node's agent; both sides prove that they know the cluster's key.

    `timeout` in seconds bounds all of it. Raises `AgentUnreachable`, or `AccessDenied` when a side lacks the key.
    """
    link: Link | None = None
    try:
        link = dial(address, timeout)
        deadline = time.monotonic() + timeout
        mine = nonce()
        link.send(Hello(VERSION, node, Identity("cluster", mine)))
        challenge, _ = link.receive(deadline)
        if isinstance(challenge, ErrorReply):
            raise from_wire(challenge.code, challenge.text)
        if not isinstance(challenge, Challenge):
            raise AccessDenied(f"the agent at {address} did not prove that it knows the cluster's key")
        key.check(challenge.proof, "called", mine, challenge.nonce, node, challenge.node)
        proof = key.proof("caller", mine, challenge.nonce, node, challenge.node)
        link.send(ChallengeAnswer(proof, own_address))
        welcome, _ = link.receive(deadline)
        if isinstance(welcome, ErrorReply):
            raise from_wire(welcome.code, welcome.text)
        if not isinstance(welcome, Welcome):
            raise ProtocolError(f"the agent at {address} answered out of turn")
    except (OSError, ValueError, Disconnected) as error:
        if link is not None:
            link.close()
        raise AgentUnreachable(f"no agent answers at {address}: {error}") from error
    except BaseException:
        if link is not None:
            link.close()
        raise
    return link
