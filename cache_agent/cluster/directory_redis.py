"""The directory that nodes share through Redis. One thread talks to Redis; all others read that thread's mirror.

    glowplug:node:<node>:alive     string   "<incarnation> <JSON of Node>"                     expires with the node
    glowplug:node:<node>:held      hash     "<tier> <model>" -> "<done> <total>"               expires with the node
    glowplug:node:<node>:rates     hash     <tier> -> bytes per second                         expires with the node
    glowplug:node:<node>:sources   hash     <source id> -> <revision>                          kept for a month
                                           uri-<hash of a URI> -> "<source id> <Unix time>"
    glowplug:claim:<name>          string   <owner>                                            expires with the claim

A node writes below `glowplug:node:<its name>:` and `glowplug:claim:` only, which is what its ACL allows. Expiry is
Redis's, so the nodes' clocks do not matter. A node keeps its own facts in memory: changes are written at once, its
sign of life with each beat, and everything again when Redis has lost it. Steps that write are Lua (directory.lua), each
one atomic. Reading needs no script, and so no right to run one: SCAN finds the keys, so this is for one Redis (with
replicas or Sentinel), not for a sharded cluster.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from cache_agent.cluster.directory import CLOCKS_APART, TTL, Holding, Node
from cache_agent.cluster.redis_connection import connect, without_password

log = logging.getLogger("glowplug.directory")

_MEMORY = 30 * 86400.0  # seconds that a source's revision is remembered
_MOST_SOURCES = 4096  # of one node; the oldest go
_VALIDATED_AGAIN = 60.0  # seconds until an unchanged validation is written again
_BATCH = 500  # changes in one step, so that no step blocks Redis for long
_HELD, _RATES, _SOURCES = 2, 3, 4  # numbers of keys in directory.lua
_KINDS = ("alive", "held", "rates", "sources")

Change = tuple[str, int, str]  # node, key, field


class RedisDirectory:
    """One agent's mirror of the shared directory, and its writes to it."""

    def __init__(
        self, url: str, *, password_file: Path | None = None, beat: float = 3.0, ttl: float = TTL, timeout: float = 0.5
    ) -> None:
        """`timeout` (seconds) bounds every exchange with Redis. Raises `BadSetting` for a bad `url`; connects later."""
        self._beat, self._ttl, self._timeout = beat, ttl, timeout
        self._client = connect(url, password_file, timeout)
        self._where = without_password(url)
        self._step = self._client.register_script(Path(__file__).with_name("directory.lua").read_text())
        self._incarnation = secrets.token_hex(8)
        self._lock = threading.Lock()  # guards everything down to _down
        self._mine: dict[str, Node] = {}
        self._values: dict[Change, str] = {}  # all facts of this agent's nodes; "" for a fact that is gone
        self._changed: dict[Change, None] = {}  # those that Redis does not know; bounded as `_values` is
        self._others: dict[str, tuple[Node | None, dict[str, float]]] = {}
        self._held: dict[str, list[Holding]] = {}  # of other live nodes, by model
        self._revisions: dict[str, str] = {}
        self._sources: dict[str, dict[str, str]] = {}  # source -> revision, by other node
        self._known = False  # whether the mirror has been read
        self._down = ""
        self._lost_at = 0.0
        self._until = 0.0  # no claim is tried before this time
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._looked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="directory", daemon=True)
        self._thread.start()

    # --- from memory ----------------------------------------------------------------------------------------------

    def heartbeat(self, node: Node) -> None:
        with self._lock:
            new = node.name not in self._mine
            self._mine[node.name] = node
        if new:
            self._wake.set()

    def nodes(self) -> list[Node]:
        with self._lock:
            others = [node for node, _ in self._others.values() if node is not None and node.name not in self._mine]
            return sorted([*self._mine.values(), *others])

    def remember(self, source: str, revision: str, node: str = "") -> None:  # noqa: ARG002  our nodes are in _mine
        with self._lock:
            self._revisions[source] = revision
            for name in self._mine:  # the ACL lets a node write below its own name only
                self._set((name, _SOURCES, source), revision)
                sources = [change for change, v in self._values.items() if change[:2] == (name, _SOURCES) and v]
                for change in sources[: max(0, len(sources) - _MOST_SOURCES)]:
                    self._set(change, "")

    def revision(self, source: str) -> str:
        with self._lock:
            return self._revisions.get(source, "")

    def stated(self, source: str) -> dict[str, str]:
        with self._lock:
            others = {node: found[source] for node, found in self._sources.items() if source in found}
            mine = ((node, self._values.get((node, _SOURCES, source), "")) for node in self._mine)
            return others | {node: revision for node, revision in mine if revision}

    def validated(self, uri: str, source: str, when: float) -> None:
        field, value = _uri_field(uri), f"{source} {when:.0f}"
        with self._lock:
            for name in self._mine:
                known, _, written = self._values.get((name, _SOURCES, field), "").partition(" ")
                if known != source or abs(when - float(written or 0)) >= _VALIDATED_AGAIN:  # clocks go back, too
                    self._set((name, _SOURCES, field), value)

    def validation(self, uri: str, now: float = math.inf) -> tuple[str, float]:
        field = _uri_field(uri)
        with self._lock:
            values = [found[field] for found in self._sources.values() if field in found]
            values += [self._values.get((name, _SOURCES, field), "") for name in self._mine]
        found = [each for each in map(_validation, values) if each[1] <= now + CLOCKS_APART]
        return max(found, key=lambda each: each[1], default=("", 0.0))

    def lost(self) -> str:
        with self._lock:
            if self._known:
                return ""
            why = f"cannot be used ({self._down})" if self._down else "has not been read yet"
            return f"the directory at {self._where} {why}"

    def wait_looked(self, seconds: float) -> None:
        """Wait until Redis was asked for the first time, with success or not."""
        self._looked.wait(seconds)

    def publish(self, model: str, holding: Holding) -> None:
        with self._lock:
            self._mine.setdefault(holding.node, Node(holding.node))
            self._set((holding.node, _HELD, f"{holding.tier} {model}"), f"{holding.done} {holding.total}")

    def withdraw(self, model: str, node: str, tier: str) -> None:
        with self._lock:
            change = node, _HELD, f"{tier} {model}"
            if change in self._values:
                self._set(change, "")

    def holders(self, model: str) -> list[Holding]:
        with self._lock:
            found = [held for held in self._held.get(model, ()) if held.node not in self._mine]
            for (node, key, field), value in self._values.items():
                tier, _, held = field.partition(" ")
                if key == _HELD and held == model and value:
                    found.append(_holding(node, tier, value))
            return sorted(found)

    def holdings(self) -> dict[str, list[Holding]]:
        with self._lock:
            found = {
                model: [holding for holding in held if holding.node not in self._mine]
                for model, held in self._held.items()
            }
            for (node, key, field), value in self._values.items():
                tier, _, model = field.partition(" ")
                if key == _HELD and value:
                    found.setdefault(model, []).append(_holding(node, tier, value))
            return {model: sorted(found[model]) for model in sorted(found) if found[model]}

    def measured(self, node: str, tier: str, rate: float) -> None:
        with self._lock:
            self._mine.setdefault(node, Node(node))
            self._set((node, _RATES, tier), repr(float(rate)))

    def bandwidth(self, node: str, tier: str) -> float:
        with self._lock:
            if node in self._mine:
                return float(self._values.get((node, _RATES, tier)) or 0.0)
            lives, rates = self._others.get(node, (None, {}))
            return rates.get(tier, 0.0) if lives else 0.0

    def _set(self, change: Change, value: str) -> None:
        """Change a fact of a node of ours, and wake the thread to write it. Under the lock."""
        self._values.pop(change, None)  # to the end: the oldest fact is always the first
        self._values[change] = value
        self._changed[change] = None
        self._wake.set()

    # --- claims, from Redis itself --------------------------------------------------------------------------------

    def claim(self, name: str, owner: str, seconds: float) -> str:
        reply = self._claims("claim", name, owner, str(max(1, round(seconds * 1000))))
        return reply.decode(errors="replace") if isinstance(reply, bytes) else ""

    def release(self, name: str, owner: str) -> bool:
        return bool(self._claims("release", name, owner) == 1)

    def _claims(self, step: str, name: str, *arguments: str) -> Any:
        with self._lock:
            if time.monotonic() < self._until:  # Redis did not answer a moment ago: no caller waits for that again
                return None
        return self._ask(step, [f"glowplug:claim:{name}"], *arguments)

    # --- the thread -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(6 * self._timeout)

    def _run(self) -> None:
        next_beat = looked = 0.0
        while not self._closing.is_set():
            self._wake.wait(max(0.0, next_beat - time.monotonic()))
            self._wake.clear()
            now = time.monotonic()
            due = now >= next_beat or (self._loads() and now - looked >= self._beat / 10)
            try:
                reached = self._exchange(full=due)
            except Exception:  # an unexpected fault must not end the thread
                log.exception("the directory failed")
                reached = False
            if due or not reached:
                looked = now
                pause = self._beat * (0.9 + 0.2 * secrets.randbelow(1000) / 1000)
                # A node that loads should learn at once which others load the same.
                next_beat = time.monotonic() + (pause / 10 if reached and self._loads() else pause)
            # Changes wake the thread, and a load makes many: one exchange writes all that have gathered meanwhile.
            self._closing.wait(self._beat / (30 if reached else 4))
        with self._lock:
            mine = list(self._mine)
        for name in mine:
            if self._ask("goodbye", _keys(name)[:3], self._incarnation) is None:
                break
        self._client.close()

    def _loads(self) -> bool:
        """Whether a node of ours holds a part of a model: its load is under way."""
        with self._lock:
            parts = [value.split() for (_, key, _), value in self._values.items() if key == _HELD and value]
        return any(done != total for done, total in parts)

    def _exchange(self, *, full: bool) -> bool:
        """Write changes; when `full`, write signs of life and read other nodes, too. False if Redis was not reached."""
        with self._lock:
            mine = list(self._mine.values())
            changed = {change[0] for change in self._changed}
        written = all(self._beat_for(node) for node in mine if full or node.name in changed)
        if not full:
            return written
        found = self._translated(self._look)  # also when nothing could be written: a full Redis can still be read
        if found is not None:
            self._mirror(found)
            if written:
                self._recovered()
        self._looked.set()
        return written and found is not None

    def _beat_for(self, node: Node) -> bool:
        """Write a node's sign of life and its changes, in batches. False when Redis was not reached."""
        while True:
            with self._lock:
                batch = [change for change in self._changed if change[0] == node.name][:_BATCH]
                sent = {change: self._values.get(change, "") for change in batch}
            arguments = [part for (_, key, field), value in sent.items() for part in (str(key), field, value)]
            times = str(round(self._ttl * 1000)), str(round(_MEMORY * 1000))
            info = json.dumps(node)
            known = self._ask("beat", _keys(node.name), self._incarnation, info, *times, str(len(sent)), *arguments)
            if known is None:
                # The step may have found the node unknown, and its answer is lost: write everything again.
                with self._lock:
                    self._forgotten(node.name)
                return False
            with self._lock:
                for change, value in sent.items():
                    if self._values.get(change, "") == value:  # else the new value goes with the next batch
                        self._changed.pop(change, None)
                        if not value:
                            self._values.pop(change, None)
                if not known:  # Redis is new, or was emptied: write everything again
                    self._forgotten(node.name, but=sent)
                more = any(change[0] == node.name for change in self._changed)
            if not more:
                return True

    def _forgotten(self, node: str, but: Container[Change] = ()) -> None:
        self._changed |= {change: None for change in self._values if change[0] == node and change not in but}

    def _mirror(self, found: list[Any]) -> None:
        others: dict[str, tuple[Node | None, dict[str, float]]] = {}
        held: dict[str, list[Holding]] = {}
        revisions: dict[str, str] = {}
        sources: dict[str, dict[str, str]] = {}
        for raw in found:
            try:
                name, alive = raw[0], (raw[1] or b"").decode()
                node = Node(*json.loads(alive.partition(" ")[2]))._replace(name=name) if alive else None
                rates = {tier: float(rate) for tier, rate in _pairs(raw[3])}
                holdings = [(*field.partition(" ")[::2], value) for field, value in _pairs(raw[2])]
                parsed = [(model, _holding(name, tier, value)) for tier, model, value in holdings]
                sources[name] = dict(_pairs(raw[4]))
                revisions |= sources[name]
                others[name] = node, rates
                for model, holding in parsed if node else ():
                    held.setdefault(model, []).append(holding)
            except (ValueError, TypeError, AttributeError, IndexError):
                continue  # of another version, or broken: the node is left out
        with self._lock:
            self._others, self._held, self._sources, self._known = others, held, sources, True
            mine = {change[2]: value for change, value in self._values.items() if change[1] == _SOURCES and value}
            self._revisions = revisions | mine

    def _ask(self, step: str, keys: list[str], *arguments: str) -> Any:
        """Return a step's reply, or None when there is none."""
        return self._translated(lambda: self._step(keys=keys, args=[step, *arguments]))

    def _look(self) -> list[Any]:
        """Read all nodes: (name, the string `alive`, then the hashes held, rates and sources)."""
        keys = sorted(set(self._client.scan_iter("glowplug:node:*:*", count=1000)))
        kinds = [
            (key, *key.decode(errors="replace").removeprefix("glowplug:node:").rpartition(":")[::2]) for key in keys
        ]
        known = [(key, node, kind) for key, node, kind in kinds if kind in _KINDS]
        with self._client.pipeline(transaction=False) as pipe:
            for key, _, kind in known:
                pipe.get(key) if kind == "alive" else pipe.hgetall(key)
            replies = pipe.execute()
        found: dict[str, dict[str, Any]] = {}
        for (_, node, kind), reply in zip(known, replies, strict=True):
            found.setdefault(node, {})[kind] = reply
        return [(node, *(entry.get(kind) for kind in _KINDS)) for node, entry in found.items()]

    def _translated(self, exchange: Callable[[], Any]) -> Any:
        """Return the reply of Redis, or None when it fails. The only place where its errors are known."""
        import redis

        try:
            return exchange()
        except (redis.RedisError, OSError, ValueError) as error:
            self._failed(f"{type(error).__name__}: {error}")
            return None

    def _recovered(self) -> None:
        with self._lock:
            down, self._down, self._until = self._down, "", 0.0
        if down:
            log.warning("the directory at %s is there again; this node has rejoined", self._where)

    def _failed(self, why: str) -> None:
        with self._lock:
            first, self._down = not self._down, why
            self._until = time.monotonic() + self._beat
            if first:
                # The mirror ages from here on. Its nodes stay until they would have expired: most still live.
                self._lost_at = time.monotonic()
            elif time.monotonic() - self._lost_at > self._ttl:
                self._others, self._held, self._known = {}, {}, False
        if first:
            log.warning(
                "the directory at %s cannot be used (%s); this node goes on without the others", self._where, why
            )


def _uri_field(uri: str) -> str:
    """Return the field of a URI, hashed: URIs may be long, and readers of the directory need not know them."""
    return "uri-" + hashlib.sha256(uri.encode()).hexdigest()[:40]


def _validation(value: str) -> tuple[str, float]:
    source, _, when = value.partition(" ")
    try:
        return source, float(when)
    except ValueError:
        return "", 0.0


def _holding(node: str, tier: str, value: str) -> Holding:
    done, total = value.split()
    return Holding(node, tier, int(done), int(total))


def _keys(node: str) -> list[str]:
    return [f"glowplug:node:{node}:{kind}" for kind in _KINDS]


def _pairs(table: dict[bytes, bytes] | None) -> list[tuple[str, str]]:
    return [(field.decode(), value.decode()) for field, value in (table or {}).items()]
