"""Owns connections to Redis: URL, TLS, a password from a file that may change, and a deadline for every exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_agent.errors import BadSetting


def connect(url: str, password_file: Path | None, timeout: float) -> Any:
    """Return a client that connects later; `timeout` (seconds) bounds each exchange. Raises `BadSetting`."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        options = redis.connection.parse_url(url)  # type: ignore[no-untyped-call]
    except (ValueError, AttributeError) as error:
        raise BadSetting(f"GLOWPLUG_REDIS_URL: {error}; use redis://, rediss:// or unix://") from error
    connection = options.pop("connection_class", redis.Connection)
    if password_file is not None:
        _read_password(password_file)
        user = options.pop("username", None)
        options.pop("password", None)
        options["credential_provider"] = _FilePassword(password_file, user)
    pool = redis.ConnectionPool(
        connection_class=connection,
        **{
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 1),  # a pooled connection may have gone stale
            **options,
        },
    )
    return redis.Redis(connection_pool=pool)


class _FilePassword:
    """Credentials read anew for every connection, so that a password can be rotated under a running agent."""

    def __init__(self, path: Path, user: str | None) -> None:
        self._path, self._user = path, user

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = _read_password(self._path)
        except BadSetting as error:
            raise OSError(error.text) from error
        return (self._user, password) if self._user else (password,)


def _read_password(path: Path) -> str:
    try:
        password = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"GLOWPLUG_REDIS_PASSWORD_FILE={path} cannot be read: {error}") from error
    if not password:
        raise BadSetting(f"GLOWPLUG_REDIS_PASSWORD_FILE={path} is empty")
    return password


def without_password(url: str) -> str:
    """Return the URL for logs: scheme, host, port and path."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def version(url: str, password_file: Path | None = None, timeout: float = 2.0) -> str:
    """Return the version of Redis, "" without the right to ask. Raises `BadSetting`, or `OSError` with the fault."""
    import redis

    client = connect(url, password_file, timeout)
    try:
        client.ping()
        try:
            return str(client.info("server").get("redis_version", ""))
        except redis.ResponseError:
            return ""
    except redis.RedisError as error:
        raise OSError(str(error) or type(error).__name__) from error
    finally:
        client.close()
