"""Owns a connection over TCP: functions get bytes in place of fds, and other nodes' agents get chunks.

Both show their identity first: an agent proves that it knows the cluster's key, a function has a token in its hello.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Sequence

from cache_agent import __version__
from cache_agent.access.control import Access
from cache_agent.cluster.key import ClusterKey, nonce
from cache_agent.errors import AccessDenied, ModelNotFound, NoDestination, ProtocolError
from cache_agent.handoff.broker import Broker
from cache_agent.handoff.splice import Splice
from cache_agent.loading.loader import ModelLoad
from cache_agent.model.manifest import CHUNK
from cache_agent.serving.agent import Agent
from cache_agent.serving.connection import Connection
from cache_agent.serving.sharing import Following
from cache_agent.wire.channel import Disconnected
from cache_agent.wire.link import Link
from cache_agent.wire.message import Message
from cache_agent.wire.messages import (
    AnyMessage,
    Challenge,
    ChallengeAnswer,
    Granted,
    Hello,
    LeaseReady,
    LeaseRequest,
    ManifestInline,
    ManifestReply,
    Offer,
    RevisionNotice,
    StreamedPiece,
    Streaming,
    Welcome,
)
from cache_agent.wire.peers import DescribeRequest, FetchRequest, FollowRequest, Holds
from cache_agent.wire.protocol import VERSION
from cache_agent.wire.requests import DestinationRequest, HandoffRequest

_IDLE_SECONDS = 60.0  # that an agent may ask for nothing
_NEWS_SECONDS = 0.1  # at least, between two reports on a followed model
_SILENCE_SECONDS = 1.0  # at most, between two reports: the follower takes a silent agent for dead


class RemoteConnection(Connection):
    """A connection of a function, or of another node's agent, over TCP."""

    channel_type = Link

    def __init__(
        self,
        agent: Agent,
        sock: socket.socket,
        access: Access,
        on_end: Callable[[Connection], None],
        broker: Broker,
        key: ClusterKey | None,
    ) -> None:
        super().__init__(agent, sock, access, on_end, broker)
        self._key = key
        self._nonces = ("", "")
        self._peer = self._address = self._have = ""
        self._heard = time.monotonic()
        self._stream: _SegmentStream | None = None
        self._following: Following | None = None
        self._news_at = -math.inf  # never

    @property
    def _link(self) -> Link:
        assert isinstance(self._channel, Link), "of its type"
        return self._channel

    # --- identity -----------------------------------------------------------------------------------------------------

    def _greet(self, hello: Hello) -> None:
        if hello.identity.kind != "cluster":
            self._require_identity(hello)
            super()._greet(hello)
            return
        if self._key is None:
            raise AccessDenied("this agent has no cluster key; set GLOWPLUG_CLUSTER_KEY_FILE on all of them")
        self._peer = hello.client
        self._nonces = hello.identity.token, nonce()
        proof = self._key.proof("called", *self._nonces, hello.client, self._agent.node)
        self._channel.send(Challenge(self._nonces[1], self._agent.node, proof))

    def _require_identity(self, hello: Hello) -> None:
        if self._access.open or hello.identity.kind == "none":
            raise AccessDenied(
                "over TCP this agent serves only callers that show who they are; give it and the function a "
                "GLOWPLUG_TOKEN_FILE"
            )

    def _prove(self, answer: ChallengeAnswer) -> None:
        assert self._key is not None, "challenged with it"
        self._key.check(answer.proof, "caller", *self._nonces, self._peer, self._agent.node)
        self._address = answer.address
        self._channel.send(Welcome(VERSION, self._agent.node, __version__))

    # --- requests -------------------------------------------------------------------------------------------------

    def _answer(self, message: AnyMessage, fds: list[int]) -> None:
        self._heard = time.monotonic()
        match message:
            case ChallengeAnswer():
                self._prove(message)
            case FetchRequest(source, number, layout):
                self._attempt(lambda: self._agent.sharing.send(self._link, source, number, layout))
            case DescribeRequest(source):
                self._attempt(lambda: self._agent.sharing.describe(self._link, source))
            case FollowRequest(source):
                self._attempt(lambda: self._follow(source))
            case LeaseRequest():
                self._have = message.have
                super()._answer(message, fds)
            case Offer():
                raise ProtocolError("memory cannot be offered over TCP")
            case HandoffRequest() if self._channel.state == "fetching":
                self._hand_over(message)
            case HandoffRequest() | DestinationRequest():
                self._refuse(NoDestination("hand-offs take the socket of the node's own agent"))
            case _:
                super()._answer(message, fds)

    def _hand_over(self, asked: HandoffRequest) -> None:
        """Carry a hand-off from another node's worker to one here, until a worker or this agent ends it."""
        assert self._key is not None, "only agents come to this state"
        try:
            sock, found = self._broker.match_for_node(asked)
        except NoDestination as error:
            self._refuse(error)
            return
        with sock:
            self._send(found)
            splice = Splice(self._link, sock, self._key, (asked.nonce, found.nonce), "called")
            splice.run(lambda: self._stopping)
        raise Disconnected("the hand-off has ended")

    def _follow(self, source: str) -> None:
        self._following = self._agent.sharing.follow(source)
        self._load = self._following.load
        if self._load is not None:
            self._load.watch(self.wake)
        if self._address:
            self._agent.sharing.invite(source, self._peer, self._address)

    def _attempt(self, give: Callable[[], None]) -> None:
        try:
            give()
        except ModelNotFound as error:
            self._refuse(error)

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send(self, message: Message, fds: Sequence[int] = ()) -> None:
        match message:
            case Granted(source, size, segments):
                super()._send(Streaming(source, segments, size))
                self._link.send_bytes(os.pread(fds[0], size, 0))
                self._stream = _SegmentStream([os.dup(fd) for fd in fds[1:]], segments)
                if source == self._have:
                    self._stream.sent = list(segments)
            case ManifestReply(size):
                super()._send(ManifestInline(size))
                self._link.send_bytes(os.pread(fds[0], size, 0))
            case LeaseReady() | RevisionNotice() if self._stream is not None:
                self._stream.after.append(message)
            case _:
                super()._send(message, fds)

    def _timeout(self) -> float | None:
        if self._stream is not None and self._stream.due(self._load) is not None:
            return 0.0
        if self._following is not None:
            return max(0.0, self._news_at + _SILENCE_SECONDS - time.monotonic())
        if self._channel.state == "peer":
            return max(0.0, self._heard + _IDLE_SECONDS - time.monotonic())
        return super()._timeout()

    def _push(self) -> None:
        if self._stream is not None:
            self._push_piece(self._stream)
        elif self._following is not None:
            self._push_news(self._following)
        elif self._channel.state == "peer" and time.monotonic() >= self._heard + _IDLE_SECONDS:
            raise Disconnected("it asked for nothing for a while")

    def _push_piece(self, stream: _SegmentStream) -> None:
        due = stream.due(self._load)
        if due is not None:
            segment, offset, size = due
            self._channel.send(StreamedPiece(segment, offset, size))
            self._link.send_file(stream.fds[segment], offset, size)
            stream.sent[segment] += size
        if stream.complete and stream.after:
            self._stream = None
            stream.close()
            for message in stream.after:
                super()._send(message)

    def _push_news(self, following: Following) -> None:
        now = time.monotonic()
        if now < self._news_at + _NEWS_SECONDS:
            return
        if following.over:
            self._refuse(ModelNotFound("the model has left this node's memory"))
        news = following.news()
        if news is not None or now >= self._news_at + _SILENCE_SECONDS:
            self._news_at = now
            self._channel.send(Holds(*(news or ([], following.reading))))

    def close(self) -> None:
        super().close()
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _SegmentStream:
    """A model's segments on their way to a function over TCP."""

    def __init__(self, fds: list[int], sizes: Sequence[int]) -> None:
        """`fds` are the segments', `sizes` their bytes. Takes over `fds`."""
        self.fds = fds
        self.sent = [0] * len(sizes)
        self.after: list[Message] = []  # sent once all bytes are
        self._sizes = list(sizes)

    @property
    def complete(self) -> bool:
        return self.sent == self._sizes

    def due(self, load: ModelLoad | None) -> tuple[int, int, int] | None:
        """Return segment, offset and size of the next piece that can be sent, or None."""
        there = self._sizes
        if load is not None and not load.finished.is_set():
            there = load.progress()[0]
        for segment, sent in enumerate(self.sent):
            if sent < there[segment]:
                return segment, sent, min(CHUNK, there[segment] - sent)
        return None

    def close(self) -> None:
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)
