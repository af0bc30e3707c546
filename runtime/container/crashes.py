"""Children that end without being asked to: how often that may happen, and how the log words it. Pure."""

from __future__ import annotations

import signal

_MOST, _WINDOW = 3, 60.0


class Crashes:
    """The crashes of the last minute, of the worker and the private agent together."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def too_many(self, now: float) -> int:
        """Note a crash; return how many there were within a minute if that is too many, else 0."""
        self._at = [at for at in self._at if now - at < _WINDOW] + [now]
        return len(self._at) if len(self._at) > _MOST else 0


def described(code: int) -> str:
    """Return in words how a worker with this exit code ended (negative: killed by that signal), with advice."""
    if code >= 0:
        return f"ended with code {code}"
    what = f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGSEGV:
        what += (
            " (if its code writes into the model's weights: they are shared and read-only; set "
            "GLOWPLUG_PRIVATE_WEIGHTS=1 for a copy of its own)"
        )
    if code == -signal.SIGKILL:
        what += " (if nobody sent it, the container's memory limit is too small)"
    return what
