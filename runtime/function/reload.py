"""Owns the handler of a function under development: imported again, in the running worker, when a file of it changes.

The model stays where it is, so a change is served milliseconds after it was saved. What the old code began (threads,
open files) is not undone; that is why this is for development.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flask import Response

from runtime.errors import FunctionError
from runtime.function.handler import Context, Event, Handler, Scope, load

if TYPE_CHECKING:
    from runtime.function.model import Model, TextStream

log = logging.getLogger("glowplug.reload")

_LOOK_SECONDS = 0.3
Stamp = tuple[tuple[str, int, int], ...]


class Reloading(Handler):
    """A `Handler` that follows its folder. While the code cannot be imported, requests are answered with the reason."""

    def __init__(self, folder: str, packages: str, model: Model, scope: Scope) -> None:
        self._place = Path(folder).absolute()
        self._load: Callable[[], Handler] = partial(load, folder, packages, model, scope)
        self._lock = threading.Lock()  # guards everything below
        self._stamp: Stamp | None = None
        self._handler: Handler | None = None
        self._error: FunctionError | None = None
        sys.dont_write_bytecode = True  # its stamp is in seconds: two changes within one would look alike
        with contextlib.suppress(FunctionError):
            self.refresh()

    def __call__(
        self,
        event: Event,
        context: Context,
        accept: str = "",
        keep: Callable[[TextStream], None] | None = None,
        ends: float = math.inf,
    ) -> Response:
        handler = self.refresh()
        return handler(event, context, accept, keep, ends)

    def refresh(self) -> Handler:
        """The handler as it is on disk now. Raises what its import raised, until a file changes."""
        with self._lock:
            stamp = _stamp(self._place)
            if stamp != self._stamp:
                changed, self._stamp = self._stamp is not None, stamp
                self._import(changed)
            if self._error is not None:
                raise self._error
            assert self._handler is not None, "there is one or the other"
            return self._handler

    def watch(self) -> None:
        """Looks for changes in a thread of its own, so that errors are told when a file is saved."""
        threading.Thread(target=self._watch, name="reload", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                self.refresh()
            except FunctionError:
                continue  # told when it came up, and in every answer

    def _import(self, changed: bool) -> None:
        begun = time.monotonic()
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "function" or self._is_ours(getattr(module, "__file__", None)):
                del sys.modules[name]
        importlib.invalidate_caches()
        try:
            self._handler, self._error = self._load(), None
        except FunctionError as error:
            error.text += self._where(error)
            log.error("%s [%s]", error.text, error.code)
            self._error = error
            return
        if changed:
            log.warning("%s changed and was imported again, in %.0f ms", self._place, (time.monotonic() - begun) * 1e3)

    def _is_ours(self, file: str | None) -> bool:
        return file is not None and self._place in Path(file).parents

    def _where(self, error: FunctionError) -> str:
        """The developer's own line, where the traceback has one."""
        for frame in reversed(traceback.extract_tb(error.__cause__.__traceback__ if error.__cause__ else None)):
            if self._is_ours(frame.filename):
                return f" (at {Path(frame.filename).relative_to(self._place)}, line {frame.lineno})"
        return ""


def _stamp(place: Path) -> Stamp:
    """What tells one state of the folder's sources from another."""
    found = []
    for path in sorted(place.rglob("*.py")):
        try:
            status = path.stat()
        except OSError:  # an editor replaces it just now
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)
