"""What a client shows of itself: a secret or a ServiceAccount token, read anew for every connection.

The kubelet renews the latter under a running pod, and whoever rotates a secret replaces its file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cache_agent.access.identity import read_token
from cache_agent.errors import BadSetting
from cache_agent.wire.messages import Identity

OPERATOR = "operator"  # of a directory of secrets, the one that the agent's own commands show


def none() -> Identity:
    return Identity()


def shown(token_file: Path | str | None, identity_file: Path | str | None = None) -> Callable[[], Identity]:
    """What to call for an identity; a secret goes before a ServiceAccount, "" is no file. It raises `BadSetting`."""
    if token_file:
        return lambda: Identity("token", read_token(_single(Path(token_file))))
    if identity_file:
        return lambda: Identity("kubernetes", _account(Path(identity_file)))
    return none


def _single(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (path / OPERATOR).is_file():
        raise BadSetting(f"GLOWPLUG_TOKEN_FILE={path} is a directory without {OPERATOR!r}; name the file of one secret")
    return path / OPERATOR


def _account(path: Path) -> str:
    """An agent that asks for it says what is missing; one that does not must not fail for want of it."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
