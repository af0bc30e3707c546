"""Owns the rights file: read at the start, and again when it changes; after a mistake the former rights stay in force.

[namespace.llm]                     # a Kubernetes namespace; "*" is every namespace that is not named
models = ["s3://models/llm", "hf://org/name@main", "file:///models"]     # these places, and all below; "*" is all
dram = "40G"                        # memory that its functions may hold for themselves

[account."llm/batch"]               # one ServiceAccount; counts instead of its namespace
models = ["s3://models/batch"]

[token.ops]                         # the secret of this name
admin = true                        # any model, and the commands that change what others have
"""

from __future__ import annotations

import logging
import threading
import tomllib
from pathlib import Path

import msgspec

from cache_agent.config import parse_size
from cache_agent.errors import AgentError, BadSetting
from cache_agent.model.uri import parse_uri
from cache_agent.policy.rights import ANY, Permission, Prefix, Rights, pieces
from cache_agent.stamp import Stamp, stamp

log = logging.getLogger("glowplug.rights")

_LARGEST = 1 << 20


class _Grant(msgspec.Struct, forbid_unknown_fields=True):
    models: list[str] = []
    admin: bool = False
    dram: str | int | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    namespace: dict[str, _Grant] = {}
    account: dict[str, _Grant] = {}
    token: dict[str, _Grant] = {}


class RightsFile:
    """The rights in a file. Any thread."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises `BadSetting`."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp: Stamp | None = _stamp(path)
        self._rights = read(path)
        self._said = ""

    def current(self) -> Rights:
        """Return the rights now. A mistake in the file is logged, not raised: people edit it on a live node."""
        with self._lock:
            try:
                now = _stamp(self._path)
                if now != self._stamp:
                    self._stamp = now  # before reading: a mistake must not be read again for every request
                    self._rights = read(self._path)
                    log.info("%s was read again: %d grants", self._path, len(self._rights.grants))
                    self._said = ""
            except BadSetting as error:
                if error.text != self._said:
                    log.error("%s; the former rights stay in force", error.text)
                    self._said = error.text
            return self._rights

    def reload(self) -> None:
        """Read the file again, changed or not."""
        with self._lock:
            self._stamp = None
        self.current()


def _stamp(path: Path) -> Stamp:
    try:
        return stamp(path)
    except OSError as error:
        raise BadSetting(f"GLOWPLUG_RIGHTS={path} cannot be read: {error.strerror}") from error


def read(path: Path) -> Rights:
    """Return the rights in a file. Raises `BadSetting`, which names the entry."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise BadSetting(f"GLOWPLUG_RIGHTS={path} has more than {_LARGEST >> 20} MiB")
        found = msgspec.convert(tomllib.loads(data.decode()), _File)
    except OSError as error:
        raise BadSetting(f"GLOWPLUG_RIGHTS={path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of msgspec
        raise BadSetting(f"GLOWPLUG_RIGHTS={path}: {error}") from error
    grants: dict[tuple[str, str], Permission] = {}
    for kind, table in (("namespace", found.namespace), ("account", found.account), ("token", found.token)):
        for name, given in table.items():
            where = f"GLOWPLUG_RIGHTS={path}: [{kind}.{name}]"
            if kind == "account" and name.count("/") != 1:
                raise BadSetting(f"{where}: an account is written namespace/name")
            grants[kind, name] = _grant(given, where)
    return Rights(grants)


def _grant(given: _Grant, where: str) -> Permission:
    try:
        dram = parse_size(given.dram) if isinstance(given.dram, str) else given.dram
    except ValueError as error:
        raise BadSetting(f"{where} dram = {given.dram!r}: {error}") from error
    if dram is not None and dram < 0:
        raise BadSetting(f"{where} dram = {given.dram!r}: use a number of bytes, or one with K, M, G or T")
    return Permission(tuple(_prefix(text, where) for text in given.models), given.admin, dram)


def _prefix(text: str, where: str) -> Prefix:
    if text == ANY:
        return Prefix(ANY, ())
    scheme, separator, rest = text.partition("://")
    if separator and not rest.strip("/"):
        return Prefix(scheme, ())  # all of a scheme
    try:
        uri = parse_uri(text)
    except AgentError as error:
        raise BadSetting(f"{where} models: {error.text}") from error
    if uri.revision:
        raise BadSetting(f"{where} models: {text}: rights are to places; leave @{uri.revision} out")
    found = pieces(uri.scheme, uri.place)
    if found is None:
        raise BadSetting(f"{where} models: {text}: write the place plainly, without dot segments or encoded characters")
    if uri.scheme == "hf" and "@" not in uri.place:
        found = found[:-1]  # any branch
    return Prefix(uri.scheme, found)
