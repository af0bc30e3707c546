"""The right to a model: callers, the prefixes that they were granted, and how a URI matches a prefix. Pure.

A URI is compared piece by piece, never as text: `s3://models/llm` grants `s3://models/llm/a` and not `s3://models/llm2`.
A URI that another program could read as another place (dot segments, in any encoding, empty segments, backslashes) is
granted to administrators only. A place that is not listed is not granted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_ENCODED = re.compile(r"%(2e|2f|5c|25|00)", re.IGNORECASE)  # . / \ % NUL, which a store might decode once more
_DEFAULT_BRANCH = "main"
ANY = "*"
AUDIENCE = "glowplug"  # of the token that proves a pod's identity to agents only


class Caller(NamedTuple):
    """The proved identity of a caller; `kind` names the proof (`none`, `token`, `kubernetes`).

    `namespace` and `name` are those of a ServiceAccount; a token has a name only. `pod` is the proved UID of the
    caller's pod, or "".
    """

    namespace: str
    name: str
    kind: str
    pod: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name or self.kind

    @property
    def account(self) -> str:
        """The name of the account that its leases count for; the pods of a namespace share one."""
        return f"namespace {self.namespace}" if self.namespace else f"token {self.name}" if self.name else ""


NOBODY = Caller("", "", "none")


class Prefix(NamedTuple):
    """All URIs at or below a place; the scheme "*" covers every URI."""

    scheme: str
    pieces: tuple[str, ...]

    def covers(self, scheme: str, pieces: tuple[str, ...]) -> bool:
        if self.scheme == ANY:
            return True
        return self.scheme == scheme and pieces[: len(self.pieces)] == self.pieces


@dataclass(frozen=True, slots=True)
class Permission:
    """The grant of a caller; `dram` is the memory in bytes that the caller may hold alone, None for no limit."""

    models: tuple[Prefix, ...] = ()
    admin: bool = False
    dram: int | None = None

    def covers(self, scheme: str, place: str) -> bool:
        if self.admin:
            return True
        found = pieces(scheme, place)
        return found is not None and any(prefix.covers(scheme, found) for prefix in self.models)


NOTHING = Permission()
EVERYTHING = Permission((Prefix(ANY, ()),), admin=True)


@dataclass(frozen=True, slots=True)
class Rights:
    """Grants by ("account", "namespace/name"), ("namespace", name or "*") and ("token", name)."""

    grants: Mapping[tuple[str, str], Permission]

    def of(self, caller: Caller) -> Permission:
        """Return the closest grant, which alone counts: the account's, else its namespace's, else every namespace's."""
        keys: Iterable[tuple[str, str]] = ()
        if caller.kind == "kubernetes":
            account = f"{caller.namespace}/{caller.name}"
            keys = (("account", account), ("namespace", caller.namespace), ("namespace", ANY))
        elif caller.kind == "token":
            keys = (("token", caller.name),)
        return next((self.grants[key] for key in keys if key in self.grants), NOTHING)


def pieces(scheme: str, place: str) -> tuple[str, ...] | None:
    """Return a model's place in pieces, the largest first; None where the place could be read in two ways.

    `place` is the text behind `scheme://`, decoded where the scheme's reader decodes it. A hub's branch is a piece.
    """
    branch = ""
    if scheme == "hf":
        place, _, branch = place.partition("@")
        branch = branch or _DEFAULT_BRANCH
    elif scheme == "file":
        if not place.startswith("/"):
            return None
        place = place[1:]
    found = tuple(place.rstrip("/").split("/")) if place.rstrip("/") else ()
    if not all(_is_plain(piece) for piece in (*found, *(branch.split("/") if branch else ()))):
        return None
    return (*found, f"@{branch}") if branch else found


def _is_plain(piece: str) -> bool:
    return piece not in ("", ".", "..") and piece.isprintable() and "\\" not in piece and not _ENCODED.search(piece)
