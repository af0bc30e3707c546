"""Owns the watch on this node's pods, by which the agent announces a pod's removal long before its SIGTERM.

The watch asks for the metadata of this node's pods only, so that no pod's environment comes here. Knative sends SIGTERM
30 s after the last request arrived; a function that hears of its removal earlier uses that time.

    list ──► watch from its version ──► … ──► the connection ends ──► watch again from the last version seen
      ▲                                                                      │
      └──────────────── 410: that version is forgotten ◄─────────────────────┘

While the API server is away functions hear of their removal by SIGTERM alone.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import msgspec

from cache_agent.access.kubernetes import SERVICE_ACCOUNT, Api

log = logging.getLogger("glowplug.witness")

_PARTIAL = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
_WATCH_SECONDS = 240  # after which the API server ends a watch
_SILENCE_SECONDS = _WATCH_SECONDS + 30.0  # after which a silent connection is dead
_PAUSES = (0.2, 30.0)  # seconds between attempts: first, and at most
_PAGE = 500
_LONGEST_LINE = 8 << 20
_LONGEST_LIST = 64 << 20
_DEFAULT_GRACE = 30.0


class ObjectMetadata(msgspec.Struct):
    """The metadata of a pod, or of a list of pods."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""  # noqa: N815  Kubernetes' names
    deletionTimestamp: str | None = None  # noqa: N815
    deletionGracePeriodSeconds: float | None = None  # noqa: N815
    continue_: str = msgspec.field(default="", name="continue")


class _WatchedObject(msgspec.Struct):
    """A pod's metadata; in an event of type ERROR, a Status with its code."""

    metadata: ObjectMetadata = msgspec.field(default_factory=ObjectMetadata)
    code: int = 0
    message: str = ""


class _ObjectList(msgspec.Struct):
    metadata: ObjectMetadata
    items: list[_WatchedObject]


class _WatchEvent(msgspec.Struct):
    type: str
    object: _WatchedObject


_lists = msgspec.json.Decoder(_ObjectList)
_events = msgspec.json.Decoder(_WatchEvent)


class Removal(NamedTuple):
    """A pod that is removed in `grace` seconds."""

    uid: str
    name: str
    grace: float


class AnnouncedRemovals:
    """The removals that were announced, so that each is announced once. No I/O."""

    def __init__(self) -> None:
        self._announced: set[str] = set()

    def listed(self, pods: list[ObjectMetadata], now: datetime) -> list[Removal]:
        """Return the removals to announce, given all pods of the node."""
        self._announced &= {pod.uid for pod in pods}
        return [removal for pod in pods if (removal := self.changed(pod, now)) is not None]

    def changed(self, pod: ObjectMetadata, now: datetime) -> Removal | None:
        """Return the removal to announce, if this pod is being removed and was not announced."""
        if not pod.deletionTimestamp or not pod.uid or pod.uid in self._announced:
            return None
        self._announced.add(pod.uid)
        return Removal(pod.uid, f"{pod.namespace}/{pod.name}", _grace(pod, now))

    def deleted(self, pod: ObjectMetadata) -> None:
        """Forget a pod that has gone."""
        self._announced.discard(pod.uid)


def _grace(pod: ObjectMetadata, now: datetime) -> float:
    """Return the seconds until the pod is killed: the rest of its grace by this node's clock."""
    grace = _DEFAULT_GRACE if pod.deletionGracePeriodSeconds is None else pod.deletionGracePeriodSeconds
    try:
        ends = datetime.fromisoformat(pod.deletionTimestamp or "")
        left = (ends - now).total_seconds()
    except (ValueError, TypeError):  # no time, or one without a zone
        left = grace
    return max(0.0, min(grace, left))


class _VersionExpired(Exception):
    """The API server's reply that it has forgotten the version to watch from."""


class _ApiFailed(Exception):
    """The failure to ask the API server; the text says why."""


class Witness:
    """A watch, from `start` to `close`. `announce(removal)` runs on the witness's own thread, and may raise."""

    def __init__(
        self, url: str, node: str, announce: Callable[[Removal], object], account: Path = SERVICE_ACCOUNT
    ) -> None:
        """`url` is the API server's; `account` holds the files `token` and `ca.crt`. Raises `BadSetting`."""
        self._api = Api(url, account)
        self._node = node
        self._announce = announce
        self._announced = AnnouncedRemovals()
        self._version = ""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float = 5.0) -> None:
        self._stop.set()
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join(seconds)

    # --- the witness's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = _PAUSES[0]
        while not self._stop.is_set():
            try:
                if not self._version:
                    self._list()
                self._watch()
                pause = _PAUSES[0]
            except _VersionExpired:
                log.debug("the watch's version has expired; listing again")
                self._version = ""
            except (_ApiFailed, OSError, HTTPException, msgspec.DecodeError, UnicodeDecodeError) as error:
                self._complain(f"the Kubernetes API cannot be watched: {error or type(error).__name__}")
            except Exception:
                log.exception("watching pods failed")
                self._version = ""
            self._stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  all agents lose a server together
            pause = min(_PAUSES[1], pause * 2)

    def _list(self) -> None:
        """List all pods, and announce those that are being removed."""
        pods: list[ObjectMetadata] = []
        token = ""
        while True:
            query = {"fieldSelector": f"spec.nodeName={self._node}", "limit": str(_PAGE)}
            with self._ask(query | ({"continue": token} if token else {}), _PARTIAL.format("List")) as response:
                body = response.read(_LONGEST_LIST)
            found = _lists.decode(body)
            pods += [item.metadata for item in found.items]
            token = found.metadata.continue_
            if not token:
                break
        for removal in self._announced.listed(pods, datetime.now(UTC)):
            self._announce_removal(removal)
        self._version = found.metadata.resourceVersion

    def _watch(self) -> None:
        """Announce removals as they come, until the API server ends the watch."""
        query = {
            "fieldSelector": f"spec.nodeName={self._node}",
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        with self._ask(query, _PARTIAL.format("")) as response:
            self._recovered()
            while line := response.readline(_LONGEST_LINE):
                if not line.endswith(b"\n"):
                    raise _ApiFailed("an event was cut short")
                event = _events.decode(line)
                pod = event.object.metadata
                match event.type:
                    case "ERROR":
                        if event.object.code == 410:
                            raise _VersionExpired
                        raise _ApiFailed(event.object.message or f"error {event.object.code}")
                    case "ADDED" | "MODIFIED":
                        removal = self._announced.changed(pod, datetime.now(UTC))
                        if removal is not None:
                            self._announce_removal(removal)
                    case "DELETED":
                        self._announced.deleted(pod)
                self._version = pod.resourceVersion or self._version

    @contextlib.contextmanager
    def _ask(self, query: dict[str, str], accept: str) -> Iterator[HTTPResponse]:
        connection = self._api.connection()
        try:
            headers = self._api.headers(Accept=accept)
            connection.connect()
            with self._lock:
                self._socket = connection.sock
            if self._stop.is_set():
                raise _ApiFailed("the agent stops")
            connection.sock.settimeout(_SILENCE_SECONDS)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.request("GET", self._api.path(f"/api/v1/pods?{urlencode(query)}"), headers=headers)
            response = connection.getresponse()
            if response.status == 410:
                raise _VersionExpired
            if response.status != 200:
                hint = {401: "; is its token mounted?", 403: "; bind the ClusterRole glowplug-agent"}
                raise _ApiFailed(f"it answers {response.status} {response.reason}{hint.get(response.status, '')}")
            with response:
                yield response
        finally:
            with self._lock:
                self._socket = None
            connection.close()

    def _announce_removal(self, removal: Removal) -> None:
        try:
            self._announce(removal)
        except Exception:
            log.exception("announcing that %s is removed failed", removal.name)

    def _complain(self, text: str) -> None:
        """Log a reason once: an API server that is away for an hour takes one line."""
        if text != self._complaint and not self._stop.is_set():
            log.warning("%s; functions hear of their end by SIGTERM only", text)
            self._complaint = text

    def _recovered(self) -> None:
        if self._complaint:
            log.info("the Kubernetes API is watched again")
            self._complaint = ""
