"""Imports torch and transformers for a start: only the modules that serving needs, in as little time as possible.

Four measures, none of which changes the results of a model:

- `torch._dynamo`, which transformers' decorators ask for at import, is only imported when it is used;
- transformers finds that there is no torch.distributed: a function is one process;
- a file beside our bytecode says which class is in which of transformers' files, instead of all those files being read
  at every start;
- torch's library is mapped without the interpreter's lock, while a worker's HTTP side is imported.

A transformers that cannot be imported this way, because its layout is another one, is imported as it stands.
GLOWPLUG_LEAN_IMPORTS=0 asks for that.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import marshal
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_log = logging.getLogger("glowplug.imports")

_DYNAMO = "torch._dynamo"
_ALONE = "torch._dynamo._trace_wrapped_higher_order_op"  # needed by every model, and works without its package
_PROBES = "transformers.utils.import_utils"
_MARKS = ("assume_constant_result", "allow_in_graph")  # decorators that return the function unchanged


class Importing:
    """A thread that maps torch's library at once, and imports modules after `begin`.

    `started` and `ended` are the times of the modules' import, in ns of CLOCK_MONOTONIC.
    """

    def __init__(self, load: Callable[[], None], *, lean: bool = True) -> None:
        """`load` imports the modules."""
        self._load, self._lean = load, lean
        self._go, self._done = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self.started = self.ended = 0
        threading.Thread(target=self._run, name="importer", daemon=True).start()

    def begin(self) -> None:
        self._go.set()

    def wait(self) -> None:
        """Return once all is imported. Raise the exception of the import."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            map_libraries()
            self._go.wait()
            self.started = time.monotonic_ns()
            imported(self._load, lean=self._lean)
        except BaseException as error:
            self._error = error
        finally:
            self.ended = time.monotonic_ns()
            self._done.set()


def imported(load: Callable[[], None], *, lean: bool = True) -> None:
    """Call `load`, which imports torch and transformers, the lean way if that works, else as they stand."""
    if not lean or "transformers" in sys.modules:
        load()
        return
    before = set(sys.modules)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        load()
    except Exception as error:
        _log.warning("transformers is imported as it stands, the lean way failed: %s", error, exc_info=True)
        finder.enabled = False
        for name in set(sys.modules) - before:
            package, _, leaf = name.rpartition(".")
            if name.partition(".")[0] in ("transformers", "runtime"):
                del sys.modules[name]
                getattr(sys.modules.get(package), "__dict__", {}).pop(leaf, None)
        load()


def map_libraries() -> None:
    """Map torch's shared library, as importing torch would, but without the interpreter's lock."""
    import ctypes

    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        # A foreign function is called without the lock; CDLL and import call dlopen with the lock.
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.restype = ctypes.c_void_p
        for name, mode in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", os.RTLD_LOCAL)):
            path = os.path.join(folder, "lib", name)
            if os.path.exists(path):
                dlopen(os.fsencode(path), os.RTLD_NOW | mode)


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that puts `torch._dynamo` off, and changes transformers' probes once they are defined."""

    def __init__(self) -> None:
        self.enabled = True
        self.deferred: _Deferred | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.enabled:
            return None
        if name == _PROBES:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Then(spec.loader, _change_probes)
            return spec
        if name == _DYNAMO and self.deferred is None:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None:
                self.deferred = _Deferred(name)
                spec.loader = _Given(self.deferred)
            return spec
        if name.startswith(_DYNAMO + ".") and name != _ALONE and self.deferred is not None and self.deferred.waiting:
            # A module of the package needs the complete package, and completing it may import the module, too.
            self.deferred.complete()
            if name in sys.modules:
                module = sys.modules[name]
                return ModuleSpec(name, _Given(module, module.__spec__))
        return None


class _Given(importlib.abc.Loader):
    """A loader of a module that exists already."""

    def __init__(self, module: types.ModuleType, spec: ModuleSpec | None = None) -> None:
        self._module, self._spec = module, spec

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:  # noqa: ARG002  the protocol's
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        if self._spec is not None:
            module.__spec__ = self._spec


class _Then(importlib.abc.Loader):
    """A loader that loads with `loader`, and then calls `after` with the module."""

    def __init__(self, loader: Any, after: Callable[[types.ModuleType], None]) -> None:
        self._loader, self._after = loader, after

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        module: types.ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._after(module)


class _Deferred(types.ModuleType):
    """A stand-in for `torch._dynamo` that notes decorated functions, and is replaced by the real module on first use.

    The real module then gets the notes, so that it compiles later code as ever.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__dict__["waiting"] = True
        self.__dict__["notes"] = []
        self.__dict__["lock"] = threading.Lock()

    def __getattr__(self, attribute: str) -> Any:
        if self.waiting:
            if attribute in _MARKS:
                return functools.partial(self._mark, attribute)
            if attribute == "disable":
                return self._disable
            if attribute.startswith("__"):
                raise AttributeError(attribute)
        return getattr(self.complete(), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute.startswith("__") or isinstance(value, types.ModuleType):  # what importing itself sets
            self.__dict__[attribute] = value
        else:
            setattr(self.complete(), attribute, value)

    def complete(self) -> types.ModuleType:
        """Import and return the real module; the import system's locks are enough for threads that want it at once."""
        name = self.__name__
        with self.lock:
            mine, self.__dict__["waiting"] = self.waiting, False
            if mine:
                del sys.modules[name]
                sys.modules["torch"].__dict__.pop(name.rpartition(".")[2], None)
        real = importlib.import_module(name)
        if mine:
            for attribute, function in self.__dict__.pop("notes"):
                getattr(real, attribute)(function)
            for attribute, value in self.__dict__.items():
                if isinstance(value, types.ModuleType):  # imported ahead of its package
                    real.__dict__.setdefault(attribute, value)
        return real

    def _mark(self, attribute: str, function: Any) -> Any:
        self.notes.append((attribute, function))
        return function

    def _disable(self, function: Any = None, *arguments: Any, **keywords: Any) -> Any:
        """Decorate `function` so that the real `disable` is only called once there is a compiler."""
        if function is None:
            return lambda decorated: self._disable(decorated, *arguments, **keywords)
        if not isinstance(function, types.FunctionType):
            return self.complete().disable(function, *arguments, **keywords)
        disabled: list[Any] = []

        @functools.wraps(function)
        def later(*args: Any, **kwargs: Any) -> Any:
            if self.waiting:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(self.complete().disable(function, *arguments, **keywords))
            return disabled[0](*args, **kwargs)

        return later


def _change_probes(probes: types.ModuleType) -> None:
    """Replace transformers' probes; a probe that this version of transformers does not have is left out."""
    if callable(getattr(probes, "is_torch_distributed_available", None)):
        probes.is_torch_distributed_available = functools.lru_cache(lambda: False)  # type: ignore[attr-defined]
    scan = getattr(probes, "create_import_structure_from_path", None)
    package = sys.modules.get("transformers")
    if callable(scan) and package is not None and package.__file__:
        probes.create_import_structure_from_path = Structure(scan, Path(package.__file__).parent)  # type: ignore[attr-defined]


class Structure:
    """A cache of the classes that transformers' `models` folder defines, in a file where Python keeps bytecode.

    The cache is valid while size and time of the package's first file, and the time of the `models` folder, are the
    same: as with Python's bytecode.
    """

    def __init__(
        self, scan: Callable[[Any], Any], package: Path, place: Path = Path(__file__).parent / "__pycache__"
    ) -> None:
        """`scan` is transformers' function, `package` its folder, `place` the folder of the cache's file."""
        self._scan = scan
        self._models = package / "models"
        self._known: dict[str, Any] | None = None
        first, folder = (package / "__init__.py").stat(), self._models.stat()
        self._key = (str(package), first.st_size, first.st_mtime_ns, folder.st_mtime_ns)
        tag = sys.implementation.cache_tag or "python"
        self._file = place / f"transformers-models.{tag}.marshal"

    def __call__(self, path: Any) -> Any:
        place = Path(path)
        place = place if place.is_dir() else place.parent
        if place == self._models:
            return self._all()
        if place.parent == self._models and self._known is not None and isinstance(self._known.get(place.name), dict):
            return self._known[place.name]
        return self._scan(path)

    def _all(self) -> Any:
        if self._known is None:
            self._known = self._read()
        if self._known is None:
            found = self._scan(self._models)
            self._known = found
            self._write(found)
        return self._known

    def _read(self) -> dict[str, Any] | None:
        try:
            key, known = marshal.loads(self._file.read_bytes())  # noqa: S302  as trustworthy as the bytecode beside it
        except (OSError, ValueError, EOFError, TypeError):
            return None
        return known if key == self._key and isinstance(known, dict) else None

    def _write(self, known: dict[str, Any]) -> None:
        if sys.dont_write_bytecode:
            return
        unfinished = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(exist_ok=True)
            unfinished.write_bytes(marshal.dumps((self._key, known)))
            unfinished.replace(self._file)
        except (OSError, ValueError) as error:
            _log.debug("transformers' structure is not remembered: %s", error)
