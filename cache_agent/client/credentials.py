"""The identity that a client shows: a secret or a ServiceAccount token, read anew for every connection.

Both files change while a function runs: the kubelet renews a token, and operators rotate secrets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cache_agent.access.identity import read_token
from cache_agent.errors import BadSetting
from cache_agent.wire.messages import Identity

OPERATOR = "operator"  # the file in a directory of secrets that the agent's own commands show


def none() -> Identity:
    """Return the identity of a client that shows nothing."""
    return Identity()


def shown(token_file: Path | str | None, identity_file: Path | str | None = None) -> Callable[[], Identity]:
    """Return the function that reads an identity: a secret rather than a ServiceAccount; "" stands for no file.

    The returned function raises `BadSetting`.
    """
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
    """Return the token, or "" where it cannot be read: only an agent that asks for identities minds, and says so."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
