"""A process's side of the agent: `CacheClient.lease(model)` gives a `Lease`, which lives as long as its connection."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cache_agent.client import credentials
from cache_agent.client.lease import KnownManifest, Lease, expect, read_manifest
from cache_agent.errors import AgentUnreachable, LeaseLost, VersionMismatch
from cache_agent.model import manifest as manifests
from cache_agent.model.manifest import Manifest
from cache_agent.wire.channel import Channel, Disconnected
from cache_agent.wire.layers import LayersReport
from cache_agent.wire.link import Link, dial
from cache_agent.wire.message import Message
from cache_agent.wire.messages import (
    Adopted,
    Granted,
    Hello,
    Identity,
    LeaseReady,
    LeaseRequest,
    ManifestInline,
    ManifestReply,
    ManifestRequest,
    Offer,
    Streaming,
    Welcome,
)
from cache_agent.wire.operations import (
    ClusterReply,
    ClusterRequest,
    EstimateReply,
    EstimateRequest,
    EventRecord,
    EventsReply,
    EventsRequest,
    EvictReply,
    EvictRequest,
    PinReply,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    PushDrain,
    PushDrainReply,
    Start,
    Started,
    StartedReply,
    StartsReply,
    StartsRequest,
    StatusReply,
    StatusRequest,
)
from cache_agent.wire.protocol import VERSION

if TYPE_CHECKING:
    from cache_agent.client.streamed import Leftover

M = TypeVar("M", bound=Message)

_TCP = "tcp:"  # and slashes, of which a Path keeps one

_DESCRIBE_SECONDS = 120.0
_ADOPT_SECONDS = 600.0  # the agent hashes the bytes, a few offers at a time, and may have to read the origin
_EVICT_SECONDS = 60.0  # removing large files takes a while


class CacheClient:
    """A client of the agent at `path`, a unix socket or tcp://host:port. Each call opens a connection of its own.

    Over TCP a lease's bytes arrive in memory of this process.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        name: str = "",
        identity: Callable[[], Identity] = credentials.none,
        pod: str = "",
        timeout: float = 10.0,
    ) -> None:
        """`name` shows in the agent's log; `timeout` is in seconds, for short answers.

        `identity` is called for every connection (see `credentials.shown`). `pod` is the UID of the pod whose removal
        the agent announces to this client.
        """
        text = str(path)
        self._address = text.removeprefix(_TCP).lstrip("/") if text.startswith(_TCP) else ""
        self.path: Path | str = text if self._address else Path(path)
        self._name, self._identity, self._pod = name[:256], identity, pod[:256]
        self._timeout = timeout
        self.node = ""  # the node's name, known from the agent's first answer on

    def lease(
        self,
        model: str,
        *,
        start_id: str = "",
        deadline: float | None = None,
        leftover: Leftover | None = None,
        known: KnownManifest | None = None,
    ) -> Lease:
        """Return a lease as soon as the agent has reserved its memory; the bytes may still be on their way.

        `deadline` (of time.monotonic) bounds the time until then. `leftover` is memory of an earlier lease over TCP:
        nothing is fetched when the model has not changed since. A lent manifest that is the one in `known` is not
        read again. Raises any `AgentError`.
        """
        by = time.monotonic() + _DESCRIBE_SECONDS if deadline is None else deadline
        with self._lasting_channel() as channel:
            if isinstance(channel, Link):
                from cache_agent.client import streamed

                if (found := streamed.lease(channel, model, start_id, by, leftover)) is not None:
                    return found
                channel.close()
                return self.lease(model, start_id=start_id, deadline=deadline)
            channel.send(LeaseRequest(model, start_id))
            granted, fds = expect(channel, Granted, by)
        return Lease(channel, granted, fds, known)

    def offer(self, model: str, lease: Lease, *, deadline: float | None = None) -> Adopted:
        """Offer the bytes of a lease whose agent went away to the present agent, and move `lease` to that connection.

        The bytes stay mapped, whether the agent adopts them or not. Raises any `AgentError`.
        """
        by = time.monotonic() + _ADOPT_SECONDS if deadline is None else deadline
        with self._lasting_channel() as channel:
            if isinstance(channel, Link):
                adopted = self._lease_without_bytes(channel, model, lease.manifest.source, by)
            else:
                channel.send(Offer(model, lease.manifest.source, len(lease.segments)), lease.segments)
                adopted, _ = expect(channel, Adopted, by)
        lease.revision = adopted.revision or lease.revision
        lease.rejoin(channel)
        return adopted

    def _lease_without_bytes(self, channel: Link, model: str, source: str, deadline: float) -> Adopted:
        """Take a lease on bytes that are in this process already; memory cannot be handed over by TCP."""
        from cache_agent.client.streamed import receive_manifest

        channel.send(LeaseRequest(model, have=source))
        if receive_manifest(channel, expect(channel, Streaming, deadline)[0]).source != source:
            raise LeaseLost(f"{model} has other files by now; this function goes on with those that it has")
        ready, _ = expect(channel, LeaseReady, deadline)
        return Adopted(ready.revision, False, "bytes that came over TCP are this function's own")

    def status(self) -> StatusReply:
        """Return the node's models, tiers, layers and hand-offs, as far as the caller may see them."""
        return self._ask(StatusRequest(), StatusReply)

    def evict(self, model: str, *, ssd: bool = False) -> int:
        """Evict a model, and return the bytes given back: of memory, and with `ssd` of disk.

        Raises `EvictRefused` while functions hold the model.
        """
        reply = self.evicted(model, ssd=ssd)
        return reply.bytes + reply.ssd

    def evicted(self, model: str, *, ssd: bool = False) -> EvictReply:
        """Evict like `evict`, and return the whole reply, which names copies that stay until functions release them."""
        return self._ask(EvictRequest(model, ssd), EvictReply, _EVICT_SECONDS if ssd else None)

    def pin(self, model: str, *, pinned: bool = True) -> int:
        """Pin or unpin a resident model, and return its bytes."""
        return self._ask(PinRequest(model, pinned), PinReply).bytes

    def estimate(self, model: str) -> EstimateReply:
        """Estimate how long a lease on the model would take to be ready, and from which tier."""
        return self._ask(EstimateRequest(model), EstimateReply, _DESCRIBE_SECONDS)

    def prefetch(self, model: str) -> None:
        """Begin to bring a model into the node's memory, without waiting for it."""
        self._ask(PrefetchRequest(model), PrefetchReply)

    def push_drain(self, reason: str, grace: float, model: str = "") -> int:
        """Ask holders of leases to hand their work over within `grace` seconds; return how many were asked."""
        return self._ask(PushDrain(reason, grace, model), PushDrainReply).holders

    def report_start(self, start: Started) -> None:
        """Report how a start went, for the agent's status page."""
        self._ask(start, StartedReply)

    def tell_layers(self, layers: LayersReport) -> None:
        """Report which layers a supervisor keeps, for the agent's status page."""
        self._ask(layers, StartedReply)

    def starts(self) -> list[Start]:
        """Return the last starts of the node's functions, the newest first."""
        return self._ask(StartsRequest(), StartsReply).starts

    def cluster(self) -> ClusterReply:
        """Return which nodes live and what they hold, as the agent's directory has it."""
        return self._ask(ClusterRequest(), ClusterReply)

    def events(self, since: int = 0) -> list[EventRecord]:
        """Return the node's last events after the one with number `since`; for administrators only."""
        return self._ask(EventsRequest(since), EventsReply).events

    def manifest(self, model: str) -> Manifest:
        """Return a model's manifest, which the agent reads from the origin without loading weights."""
        with self.channel() as channel:
            channel.send(ManifestRequest(model))
            if isinstance(channel, Link):
                inline, _ = expect(channel, ManifestInline, time.monotonic() + _DESCRIBE_SECONDS)
                return manifests.decode(channel.read(inline.body, self._timeout))
            reply, fds = expect(channel, ManifestReply, time.monotonic() + _DESCRIBE_SECONDS)
            try:
                return read_manifest(fds[0], reply.manifest_bytes)
            finally:
                os.close(fds[0])

    def _ask(self, request: Message, reply: type[M], seconds: float | None = None) -> M:
        with self.channel() as channel:
            channel.send(request)
            return expect(channel, reply, time.monotonic() + (seconds or self._timeout))[0]

    @contextmanager
    def channel(self) -> Iterator[Channel]:
        """Open a connection for the body. Raises `AgentUnreachable`, also where the connection breaks."""
        with self.connect() as channel:
            try:
                yield channel
            except Disconnected as error:
                raise AgentUnreachable(f"the cache agent at {self.path} broke off: {error}") from error

    @contextmanager
    def _lasting_channel(self) -> Iterator[Channel]:
        """Open a connection that outlives the body, unless the body fails. Raises `LeaseLost` where it breaks."""
        channel = self.connect()
        try:
            yield channel
        except BaseException as error:
            channel.close()
            if isinstance(error, Disconnected):
                raise LeaseLost(f"the cache agent at {self.path} went away ({error})") from error
            raise

    def connect(self) -> Channel:
        """Open a connection, which is the caller's to close. Raises `AgentUnreachable`, `VersionMismatch`."""
        try:
            channel = dial(self._address, self._timeout) if self._address else self._dial_local()
            try:
                self._greet(channel)
            except BaseException:
                channel.close()
                raise
        except (OSError, ValueError, Disconnected) as error:
            raise AgentUnreachable(
                f"no cache agent answers at {self.path} ({error}); start one with `glowplug agent serve`, or unset "
                "GLOWPLUG_SOCKET so that the function starts its own"
            ) from error
        return channel

    def _greet(self, channel: Channel) -> None:
        channel.send(Hello(VERSION, self._name, self._identity(), self._pod))
        welcome, _ = expect(channel, Welcome, time.monotonic() + self._timeout)
        if welcome.version != VERSION:
            raise VersionMismatch(
                f"the agent speaks protocol {welcome.version}, this client {VERSION}: update the older of the two"
            )
        self.node = welcome.node

    def _dial_local(self) -> Channel:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self._timeout)
            sock.connect(str(self.path))
        except BaseException:
            sock.close()
            raise
        return Channel(sock, of_agent=False, send_timeout=self._timeout)
