"""Owns how a start imports torch and transformers: only what serving needs, and in as little time as that takes.

Four things, none of which changes what a model computes:

- `torch._dynamo`, which transformers' decorators ask for at import, is only imported when somebody uses it;
- transformers is told that there is no torch.distributed: a function is one process;
- which class is in which of transformers' files is remembered in a file beside our bytecode, instead of being found out
  by reading all of them at every start;
- torch's library is mapped without the interpreter's lock, while a worker's HTTP side is imported.

If transformers has another layout than expected, or does not import this way at all, it is imported as it stands.
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
_ALONE = "torch._dynamo._trace_wrapped_higher_order_op"  # works without its package, and every model needs it
_PROBES = "transformers.utils.import_utils"
_MARKS = ("assume_constant_result", "allow_in_graph")  # decorators that only note something about a function


class Importing:
    """Imports in a thread of its own: torch's library at once, modules as soon as `begin` says so."""

    def __init__(self, load: Callable[[], None], *, lean: bool = True) -> None:
        """`load` imports what is wanted."""
        self._load, self._lean = load, lean
        self._go, self._done = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self.started = self.ended = 0  # of the modules, ns of CLOCK_MONOTONIC
        threading.Thread(target=self._run, name="importer", daemon=True).start()

    def begin(self) -> None:
        self._go.set()

    def wait(self) -> None:
        """Returns once all is imported. Raises what importing raised."""
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
    """Calls `load`, which imports torch and transformers, the lean way if that works, else as they stand."""
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
    """Maps torch's shared library, as importing it would, but without the interpreter's lock."""
    import ctypes

    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        # Called as a foreign function, unlike by CDLL or by import, dlopen does without the lock.
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.restype = ctypes.c_void_p
        for name, mode in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", os.RTLD_LOCAL)):
            path = os.path.join(folder, "lib", name)
            if os.path.exists(path):
                dlopen(os.fsencode(path), os.RTLD_NOW | mode)


class _Finder(importlib.abc.MetaPathFinder):
    """Puts `torch._dynamo` off, and changes transformers' probes once they are defined."""

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
            # Its modules expect their package to be complete; completing it may already import this one.
            self.deferred.complete()
            if name in sys.modules:
                module = sys.modules[name]
                return ModuleSpec(name, _Given(module, module.__spec__))
        return None


class _Given(importlib.abc.Loader):
    """Loads a module that is there already."""

    def __init__(self, module: types.ModuleType, spec: ModuleSpec | None = None) -> None:
        self._module, self._spec = module, spec

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:  # noqa: ARG002  the protocol's
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        if self._spec is not None:
            module.__spec__ = self._spec


class _Then(importlib.abc.Loader):
    """Loads as `loader` does, and then calls `after` with the module."""

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
    """`torch._dynamo` before anybody uses it: takes notes of decorated functions, and becomes the real one on demand.

    The notes are told to the real one, so that code which is compiled later is compiled as ever.
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
        """The real module; the import system's own locks order threads that want it at once."""
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
        """As long as nothing can be compiled, there is nothing that has to be kept from being compiled."""
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
    """Each only where it is what we know; what is absent stays so."""
    if callable(getattr(probes, "is_torch_distributed_available", None)):
        probes.is_torch_distributed_available = functools.lru_cache(lambda: False)  # type: ignore[attr-defined]
    scan = getattr(probes, "create_import_structure_from_path", None)
    package = sys.modules.get("transformers")
    if callable(scan) and package is not None and package.__file__:
        probes.create_import_structure_from_path = Structure(scan, Path(package.__file__).parent)  # type: ignore[attr-defined]


class Structure:
    """transformers' answer to what its `models` folder defines, remembered.

    Valid for the very files that it was made from, as far as their folder and the package's first file tell; that is
    what Python's own bytecode relies on, and it is kept in the same kind of place.
    """

    def __init__(
        self, scan: Callable[[Any], Any], package: Path, place: Path = Path(__file__).parent / "__pycache__"
    ) -> None:
        """`scan` is transformers' own way to find out, `package` its folder, `place` where the answer is kept."""
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
