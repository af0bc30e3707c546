"""Slow network links on one machine: proxies that let each node's traffic through at a fixed rate.

    store ──────────► [origin door of node i] ── in(i) ──► agent i
    agent j ── out(j) ► [peer door of node j] ── in(i) ──► agent i

All bytes that node i receives, from the store or from other nodes, share one rate, and so do all bytes that it sends.
A peer door knows the connecting node from its first frame. The bytes from the store are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_PIECE = 32 << 10  # bytes that pass at once
_BUFFER = 64 << 10


class _Rate:
    """Let a number of bytes per second through, in the order of the calls."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0

    async def take(self, count: int) -> None:
        self._free = max(self._free, time.monotonic()) + count / self._rate
        await asyncio.sleep(self._free - time.monotonic())


class Links:
    """The doors of one cluster, closed at the end of the block."""

    def __init__(self, rate: float) -> None:
        """`rate` is every node's, in bytes per second in each direction."""
        self.from_store: Counter[str] = Counter()  # bytes, by node
        self._rate = rate
        self._in: dict[str, _Rate] = {}
        self._out: dict[str, _Rate] = {}
        self._loop = asyncio.new_event_loop()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()

    def origin_door(self, node: str, host: str, port: int) -> int:
        """Return the port at which a node reaches the store."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            def count(size: int) -> None:
                self.from_store[node] += size

            await self._join(reader, writer, host, port, b"", [self._rate_of(self._in, node)], count)

        return self._open(serve)

    def peer_door(self, node: str, port: int) -> int:
        """Return the port at which others reach a node's agent."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            header = await reader.readexactly(4)
            body = await reader.readexactly(struct.unpack("!I", header)[0])
            rates = [self._rate_of(self._out, node), self._rate_of(self._in, json.loads(body)["client"])]
            await self._join(reader, writer, "127.0.0.1", port, header + body, rates, lambda _: None)

        return self._open(serve)

    def _rate_of(self, rates: dict[str, _Rate], node: str) -> _Rate:
        return rates.setdefault(node, _Rate(self._rate))

    def _open(self, serve: Any) -> int:
        async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None, "called by the server in a task of its own"
            self._tasks.add(task)
            try:
                await serve(reader, writer)
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # one side has ended, or the block
            finally:
                self._tasks.discard(task)
                writer.close()

        async def start() -> int:
            server = await asyncio.start_server(guarded, "127.0.0.1", 0, limit=_BUFFER)
            self._servers.append(server)
            return int(server.sockets[0].getsockname()[1])

        return self._call(start())

    async def _join(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
        port: int,
        first: bytes,
        rates: list[_Rate],
        count: Any,
    ) -> None:
        there, back = await asyncio.open_connection(host, port, limit=_BUFFER)
        back.write(first)
        requests = asyncio.create_task(_pass(reader, back, [], lambda _: None))
        try:
            await _pass(there, writer, rates, count)
        finally:
            requests.cancel()
            back.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def __enter__(self) -> Links:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rates: list[_Rate], count: Any) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_PIECE):
            count(len(data))
            for rate in rates:
                await rate.take(len(data))
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
