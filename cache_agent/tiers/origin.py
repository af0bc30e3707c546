"""Two ways of reading ranges that origins inherit, and the origin of directories (`file://`)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cache_agent.errors import AccessDenied, AgentError, BadModelURI, ModelNotFound, OriginChanged, OriginUnavailable
from cache_agent.model.manifest import SourceFile
from cache_agent.model.uri import ModelURI
from cache_agent.tiers.body import fill

_READ_ONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # opening a pipe put there must not wait


class ReadOneByOne:
    """`read` and `read_scattered` of an origin where a read of its own for each view costs next to nothing."""

    def read_into(self, file: SourceFile, start: int, view: memoryview) -> None:
        raise NotImplementedError

    def read(self, file: SourceFile, start: int, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(file, start, memoryview(data))
        return bytes(data)

    def read_scattered(
        self, file: SourceFile, start: int, views: Sequence[memoryview], arrived: Callable[[int], None]
    ) -> None:
        for view in views:
            self.read_into(file, start, view)
            start += len(view)
            arrived(len(view))


class ReadScattered:
    """`read`, `read_into` and `read_scattered` of an origin where every read is one HTTP request.

    A subclass makes the request, checks the answer's headers, and translates errors.
    """

    uri: str
    patience: float  # seconds with fewer than `body.SLOWEST` bytes after which a server is given up

    def _fetch(self, file: SourceFile, start: int, end: int) -> tuple[Any, Any]:
        """Ask for bytes `start` to `end`, which is included. Return the answer for `_check`, and a urllib3 response."""
        raise NotImplementedError

    def _check(self, answer: Any, file: SourceFile, start: int, end: int) -> None:
        """Raise an `AgentError` unless the answer's body is the bytes `start` to `end` of the listed file."""
        raise NotImplementedError

    def _translate(self, error: Exception, what: str) -> AgentError:
        """Return the `AgentError` for an error while doing `what`."""
        raise NotImplementedError

    def read_scattered(
        self, file: SourceFile, start: int, views: Sequence[memoryview], arrived: Callable[[int], None]
    ) -> None:
        end = start + sum(len(view) for view in views) - 1
        if end < start:
            return
        try:
            answer, body = self._fetch(file, start, end)
            try:
                self._check(answer, file, start, end)
                # The http.client response inside reads into the views; the layers around it would copy.
                fill(body._fp, views, arrived, patience=self.patience, what=f"{self.uri}: {file.name}")
            except BaseException:
                body.close()  # closes the connection, too: the next try takes another one
                raise
            body.release_conn()
        except Exception as error:
            raise self._translate(error, f"reading {file.name}") from error

    def read(self, file: SourceFile, start: int, size: int) -> bytes:
        data = bytearray(size)
        self.read_into(file, start, memoryview(data))
        return bytes(data)

    def read_into(self, file: SourceFile, start: int, view: memoryview) -> None:
        self.read_scattered(file, start, [view], lambda _: None)


class FileOrigin(ReadOneByOne):
    """A directory of this machine, below one of `roots`."""

    def __init__(self, uri: ModelURI, roots: Sequence[Path]) -> None:
        """Name the directory of a URI. Raises `BadModelURI` for a host or a relative path, and `AccessDenied`."""
        if not uri.place.startswith("/"):
            raise BadModelURI(f"{uri.text}: a file URI has three slashes and an absolute path, like file:///models/m")
        self.uri = uri.text
        self._directory = Path(os.path.realpath(uri.place))
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        if not self._allowed(self._directory):
            raise AccessDenied(f"{uri.text} lies outside the directories this agent may read; see --file-root")

    def files(self) -> list[SourceFile]:
        try:
            names = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            raise ModelNotFound(f"{self.uri}: there is no such directory on the agent's machine") from None
        except NotADirectoryError:
            raise ModelNotFound(f"{self.uri} is a file; name the directory that holds config.json") from None
        except PermissionError:
            raise AccessDenied(f"{self.uri}: the agent's user may not list this directory") from None
        except OSError as error:
            raise OriginUnavailable(f"{self.uri}: {error.strerror}") from error
        found = []
        for name in names:
            try:
                status = os.stat(self._directory / name)
            except OSError:
                continue  # a dangling link, or removed meanwhile; a file that a checkpoint needs is missed later
            # A name that is not UTF-8, or has control characters, is no checkpoint's, and no message could carry it.
            if stat.S_ISREG(status.st_mode) and name.isprintable():
                found.append(SourceFile(name, status.st_size, _etag(status)))
        if not found:
            raise ModelNotFound(f"{self.uri} holds no files")
        return found

    def read_into(self, file: SourceFile, start: int, view: memoryview) -> None:
        try:
            fd = os.open(self._directory / file.name, _READ_ONLY)
        except PermissionError:
            raise AccessDenied(f"{self.uri}: the agent's user may not read {file.name}") from None
        except OSError as error:
            raise OriginChanged(f"{self.uri}: {file.name} is gone ({error.strerror})") from error
        try:
            # Links are followed, because model caches use them; the file that was really opened is checked.
            if not self._allowed(Path(os.readlink(f"/proc/self/fd/{fd}"))):
                raise AccessDenied(f"{self.uri}: {file.name} links to a place this agent may not read")
            done = 0
            while done < len(view):
                count = os.preadv(fd, [view[done:]], start + done)
                if count == 0:
                    raise OriginChanged(f"{self.uri}: {file.name} became shorter while it was read")
                done += count
            if _etag(os.fstat(fd)) != file.etag:
                raise OriginChanged(f"{self.uri}: {file.name} was overwritten while it was read")
        except OSError as error:
            raise OriginUnavailable(f"{self.uri}: reading {file.name} failed: {error.strerror}") from error
        finally:
            os.close(fd)

    def _allowed(self, path: Path) -> bool:
        return any(path == root or root in path.parents for root in self._roots)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
