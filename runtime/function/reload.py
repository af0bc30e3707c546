"""Owns the handler of a function under development: imported again, in the running worker, when a file of it changes.

The model stays loaded, so a change is served milliseconds after it was saved. Threads that the old code began go on,
and its files stay open; that is why this is for development only.
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
    """A `Handler` as its folder is now. While the code cannot be imported, requests are answered with the error."""

    def __init__(self, folder: str, packages: str, model: Model, scope: Scope) -> None:
        self._place = Path(folder).absolute()
        self._load: Callable[[], Handler] = partial(load, folder, packages, model, scope)
        self._lock = threading.Lock()  # guards everything below
        self._stamp: Stamp | None = None
        self._handler: Handler | None = None
        self._error: FunctionError | None = None
        sys.dont_write_bytecode = True  # bytecode has a stamp in seconds: two changes within one would look alike
        with contextlib.suppress(FunctionError):
            self.refresh()

    def __call__(
        self,
        event: Event,
        context: Context,
        accept: str = "",
        sink: Callable[[TextStream], None] | None = None,
        ends: float = math.inf,
    ) -> Response:
        handler = self.refresh()
        return handler(event, context, accept, sink, ends)

    def refresh(self) -> Handler:
        """Return the handler as it is on disk now. Raise the error of its import, until a file changes."""
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
        """Look for changes in a thread, so that errors are logged as soon as a file is saved."""
        threading.Thread(target=self._watch, name="reload", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                self.refresh()
            except FunctionError:
                continue  # the log has the error already, and every answer will have it

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
        """Return the place in the developer's code that raised `error`; "" if the traceback has none."""
        for frame in reversed(traceback.extract_tb(error.__cause__.__traceback__ if error.__cause__ else None)):
            if self._is_ours(frame.filename):
                return f" (at {Path(frame.filename).relative_to(self._place)}, line {frame.lineno})"
        return ""


def _stamp(place: Path) -> Stamp:
    """Return a value that differs between any two states of the folder's sources."""
    found = []
    for path in sorted(place.rglob("*.py")):
        try:
            status = path.stat()
        except OSError:  # an editor may be replacing the file just now
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)
