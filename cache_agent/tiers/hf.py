"""Owns the reading of models from a Hugging Face hub, or a server with its API: `hf://org/name@revision`.

    GET <endpoint>/api/models/<org/name>/revision/<revision>?blobs=true    commit, and each file's size and hash
    GET <endpoint>/<org/name>/resolve/<commit>/<file>                      the file, or a redirect to its server

These two requests are made here, because the hub's own client downloads into files and cannot read a range into memory.
A branch is resolved to a commit once per load, so that all files are of one commit.
"""

from __future__ import annotations

import os
import re
from threading import Lock
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from cache_agent.errors import (
    AccessDenied,
    AgentError,
    BadModelURI,
    BadSetting,
    ModelNotFound,
    OriginChanged,
    OriginUnavailable,
)
from cache_agent.model.manifest import SourceFile
from cache_agent.model.uri import ModelURI
from cache_agent.tiers.origin import ReadScattered
from cache_agent.tiers.s3 import PATIENCE

_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", re.ASCII)
_CONNECT_SECONDS = 5.0
_HOPS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_STALE = (401, 403, 404, 410)  # answers of a signed address that has expired


class _Lfs(msgspec.Struct):
    sha256: str = ""
    size: int = -1


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blob_id: str = msgspec.field(name="blobId", default="")
    lfs: _Lfs | None = None


class _Info(msgspec.Struct):
    sha: str
    siblings: list[_Sibling] = []


_decoder = msgspec.json.Decoder(_Info)


class Hub:
    """The connection pool and the token that all models of an agent share; connected on first use."""

    def __init__(
        self, *, endpoint: str = "", token: str = "", connections: int = 64, patience: float = PATIENCE
    ) -> None:
        """Take endpoint and token, by default, from the variables HF_ENDPOINT and HF_TOKEN; `patience` in seconds."""
        self.patience = patience
        self._given = endpoint
        self._token = token or os.environ.get("HF_TOKEN", "").strip()
        self._connections = connections
        self._session: Any = None
        self._lock = Lock()

    @property
    def endpoint(self) -> str:
        """The hub's address, without a slash at its end. Raises `BadSetting`."""
        if given := self._given or os.environ.get("HF_ENDPOINT", "").strip():
            return given.rstrip("/")
        try:
            from huggingface_hub.constants import ENDPOINT
        except ImportError:
            raise BadSetting("hf:// needs HF_ENDPOINT, the hub's address, or the package huggingface_hub") from None
        return str(ENDPOINT).rstrip("/")

    def get(self, url: str, **headers: str) -> Any:
        """Send a GET, and return the response; redirects are the caller's. Only the endpoint gets the token."""
        with self._lock:
            if self._session is None:
                import requests
                from requests.adapters import HTTPAdapter

                self._session = requests.Session()
                for scheme in ("http://", "https://"):
                    self._session.mount(scheme, HTTPAdapter(pool_maxsize=self._connections))
        here, there = urlsplit(self.endpoint), urlsplit(url)
        # A body that the server compressed would not be the bytes that the range names.
        headers = {"Accept-Encoding": "identity", "User-Agent": "glowplug", **headers}
        if self._token and (here.scheme, here.netloc) == (there.scheme, there.netloc):
            headers["Authorization"] = f"Bearer {self._token}"
        return self._session.get(
            url,
            headers=headers,
            stream=True,
            allow_redirects=False,
            timeout=(_CONNECT_SECONDS, self.patience),
            auth=_no_netrc,
        )

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


class HubOrigin(ReadScattered):
    """The files at the top of one repository, at one revision."""

    def __init__(self, uri: ModelURI, hub: Hub) -> None:
        """Raises `BadModelURI`, `BadSetting`."""
        self.uri = uri.text
        name, _, revision = uri.place.strip("/").partition("@")
        if not _NAME.match(name) or ".." in name:
            raise BadModelURI(f"{uri.text}: name a repository, like hf://org/name or hf://org/name@branch")
        self._name = name
        self._revision = revision or "main"
        self._hub = hub
        self.patience = hub.patience
        self._endpoint = hub.endpoint
        self._commit = ""
        self._places: dict[str, str] = {}  # file -> the address that the hub redirected to

    def files(self) -> list[SourceFile]:
        url = f"{self._endpoint}/api/models/{self._name}/revision/{quote(self._revision, safe='')}?blobs=true"
        try:
            with self._hub.get(url) as response:
                self._expect(response, "listing it", 200)
                info = _decoder.decode(response.content)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise OriginUnavailable(
                f"{self.uri}: {self._endpoint} answered with no model's listing: {error}"
            ) from error
        except Exception as error:
            raise self._translate(error, "listing it") from error
        self._commit = info.sha
        found = []
        for item in info.siblings:
            size = item.lfs.size if item.lfs and item.lfs.size >= 0 else item.size
            etag = (item.lfs.sha256 if item.lfs else "") or item.blob_id
            if "/" not in item.rfilename and item.rfilename.isprintable():
                if size is None or not etag:
                    raise OriginUnavailable(f"{self.uri}: {self._endpoint} lists {item.rfilename} without size or hash")
                found.append(SourceFile(item.rfilename, size, etag))
        if not found:
            raise ModelNotFound(f"{self.uri}: the repository holds no files at this revision")
        return found

    def _fetch(self, file: SourceFile, start: int, end: int) -> tuple[Any, Any]:
        response = self._open(file, f"bytes={start}-{end}")
        return response, response.raw

    def _open(self, file: SourceFile, bytes_range: str) -> Any:
        """Return the answer of the server that has the file, which every range but the first asks directly.

        Hubs limit the number of requests to them, and the address of a redirect stays good for a while.
        """
        if place := self._places.get(file.name):
            response = self._hub.get(place, Range=bytes_range)
            if response.status_code not in (*_STALE, *_REDIRECTS):
                return response
            response.close()
            self._places.pop(file.name, None)
        if not self._commit:
            self.files()
        url = f"{self._endpoint}/{self._name}/resolve/{quote(self._commit, safe='')}/{quote(file.name)}"
        for _ in range(_HOPS):
            response = self._hub.get(url, Range=bytes_range)
            self._compare(response.headers.get("X-Linked-Etag", ""), file)
            if response.status_code not in _REDIRECTS:
                if url.startswith(self._endpoint + "/"):
                    # The ETag of a file that the hub itself sends is the file's hash; an error's ETag is not.
                    self._compare(
                        response.headers.get("ETag", "")
                        if response.ok and "X-Linked-Etag" not in response.headers
                        else "",
                        file,
                    )
                else:
                    self._places[file.name] = url
                return response
            url = urljoin(url, response.headers.get("Location", ""))
            response.close()
        raise OriginUnavailable(f"{self.uri}: {file.name} is redirected more than {_HOPS} times")

    def _compare(self, etag: str, file: SourceFile) -> None:
        """Raise `OriginChanged` where an ETag, if there is one, is not the listed one."""
        if etag and etag.removeprefix("W/").strip('"') != file.etag:
            raise OriginChanged(f"{self.uri}: {file.name} is another one than was listed")

    def _check(self, response: Any, file: SourceFile, start: int, end: int) -> None:
        self._expect(response, f"reading {file.name}", 200, 206)
        whole = start == 0 and end + 1 == file.size
        expected = f"bytes {start}-{end}/{file.size}"
        found = response.headers.get("Content-Range", expected if whole and response.status_code == 200 else "")
        if found != expected or response.headers.get("Content-Length") != str(end - start + 1):
            raise OriginUnavailable(
                f"{self.uri}: the server answered another range of {file.name} than the one asked for "
                f"({found or 'all of it'} instead of {expected}); it must support ranged GET"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OriginUnavailable(f"{self.uri}: the server compressed a range of {file.name}")

    def _expect(self, response: Any, what: str, *statuses: int) -> None:
        status = response.status_code
        if status in statuses:
            return
        reason = response.headers.get("X-Error-Message", "") or f"HTTP {status}"
        if status in (401, 403):
            raise AccessDenied(
                f"{self.uri}: the hub refuses {what} ({reason}): there is no such repository, or it is private or "
                "gated; check the name, and give the agent HF_TOKEN of an account that may read it"
            )
        if status == 404:
            raise ModelNotFound(f"{self.uri}: {what} found nothing ({reason}); check repository and revision")
        if status == 416:
            raise OriginChanged(f"{self.uri}: {what}: the file is shorter than it was listed")
        raise OriginUnavailable(f"{self.uri}: {what} failed ({reason})")

    def _translate(self, error: Exception, what: str) -> AgentError:
        if isinstance(error, AgentError):
            return error
        return OriginUnavailable(f"{self.uri}: {what} failed ({type(error).__name__}: {error})")


def _no_netrc(request: Any) -> Any:
    """Return the request as it is: without this, a password in ~/.netrc for the host would replace the token."""
    return request
