"""Finds out the identity of a caller, in one of three ways.

none          every client that can open the socket; only where the settings say so
token         a secret from a file, or from one of the files of a directory, whose names are the callers'
kubernetes    a ServiceAccount token that the API server reviews (tokenreview.py)
"""

from __future__ import annotations

import hmac
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cache_agent.access.keyfile import digest
from cache_agent.errors import AccessDenied, BadSetting
from cache_agent.policy.rights import NOBODY, Caller
from cache_agent.stamp import Stamp, stamp
from cache_agent.wire.messages import Identity

log = logging.getLogger("glowplug.identity")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Check(Protocol):
    """One way to prove an identity. Any thread."""

    def check(self, identity: Identity) -> Caller:
        """Return the caller. Raises `AccessDenied`, or `IdentityUnavailable` while nothing can be checked."""
        ...


class Anybody:
    """Lets every client in, without a proof."""

    def check(self, identity: Identity) -> Caller:  # noqa: ARG002
        return NOBODY


class Tokens:
    """Secrets in files, read again when the files change."""

    def __init__(self, path: Path) -> None:
        """`path` is a file, or a directory of files. Raises `BadSetting`."""
        self._path = path
        self._lock = threading.Lock()
        self._stamps: dict[str, Stamp] = {}
        self._names: dict[str, str] = {}  # digest of a secret -> name
        self._read()

    def check(self, identity: Identity) -> Caller:
        with self._lock:
            try:
                self._read()
            except BadSetting as error:
                log.error("%s; the former secrets stay good", error.text)
            names = list(self._names.items())
        given = digest(identity.token)
        found = ""
        for secret, name in names:  # every one is compared, each in constant time
            if hmac.compare_digest(secret, given):
                found = name
        if identity.kind != "token" or not found:
            raise AccessDenied("this agent asks for a token; set GLOWPLUG_TOKEN_FILE to a file that holds it")
        return Caller("", found, "token")

    def _read(self) -> None:
        secrets = token_files(self._path)
        try:
            stamps = {name: stamp(path) for name, path in secrets.items()}
        except OSError as error:
            raise BadSetting(f"GLOWPLUG_TOKEN_FILE={self._path} cannot be read: {error}") from error
        if stamps != self._stamps:
            self._names = {digest(read_token(path)): name for name, path in secrets.items()}
            self._stamps = stamps


def token_files(path: Path) -> dict[str, Path]:
    """Return the files of secrets by caller; a single file's caller is `token`. Raises `BadSetting`."""
    if not path.is_dir():
        return {"token": path}
    found = {entry.name: entry for entry in sorted(path.iterdir()) if _NAME.fullmatch(entry.name) and entry.is_file()}
    if not found:
        raise BadSetting(
            f"GLOWPLUG_TOKEN_FILE={path} is a directory without a secret; put a file for each caller there"
        )
    return found


def read_token(path: Path) -> str:
    """Return the secret in a file. Raises `BadSetting`."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"GLOWPLUG_TOKEN_FILE={path} cannot be read: {error}") from error
    if not token:
        raise BadSetting(f"GLOWPLUG_TOKEN_FILE={path} is empty")
    return token


class Identities:
    """The checks that an agent knows, by the kind of identity that a client sends."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks

    def check(self, identity: Identity) -> Caller:
        if (check := self._checks.get(identity.kind) or self._checks.get("none")) is not None:
            return check.check(identity)
        if "kubernetes" in self._checks:
            raise AccessDenied("this agent asks for a ServiceAccount token; set GLOWPLUG_IDENTITY_FILE to its file")
        raise AccessDenied("this agent asks for a token; set GLOWPLUG_TOKEN_FILE to a file that holds it")

    @property
    def anybody(self) -> bool:
        return "none" in self._checks


def identities(kind: str, token_file: Path | None, kubernetes: str) -> Identities:
    """Build the checks: `kind` is none, token, kubernetes or "", which means token where there is a `token_file`.

    Secrets are valid beside `kubernetes`, too. Raises `BadSetting`.
    """
    kind = kind or ("token" if token_file else "none")
    checks: dict[str, Check] = {}
    if kind == "none":
        checks["none"] = Anybody()
    elif token_file is not None:
        checks["token"] = Tokens(token_file)
    if kind == "token" and token_file is None:
        raise BadSetting("GLOWPLUG_IDENTITY=token needs GLOWPLUG_TOKEN_FILE, the file of the secret")
    if kind == "kubernetes":
        if not kubernetes:
            raise BadSetting("GLOWPLUG_IDENTITY=kubernetes needs GLOWPLUG_KUBERNETES, the URL of the Kubernetes API")
        # Imported here: ssl and http would delay every function that starts an agent of its own.
        from cache_agent.access.kubernetes import Api
        from cache_agent.access.tokenreview import TokenReview

        checks["kubernetes"] = TokenReview(Api(kubernetes))
    return Identities(checks)
