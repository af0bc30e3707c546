"""A warm layer: the modules, and with a model its tensors, parts and tokenizer, that a zygote's children find ready.

A zygote does everything once as a worker would do it, on its only thread: a request through the Flask application, a
forward pass through the model. Modules and memory of the first use are then there, and shared.
"""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from runtime.layers.keys import Level
from runtime.worker import imports

if TYPE_CHECKING:
    from cache_agent.client.lease import KnownManifest, Lease
    from cache_agent.model.manifest import Manifest
    from cache_agent.web.wsgi import Settings
    from runtime.http.application import Prepared
    from runtime.worker.weights import AssembledModel, Weights


_PROMPT = 32  # tokens


@dataclass(frozen=True, slots=True)
class _Lent:
    manifest: Manifest
    segments: Sequence[int]


@dataclass(frozen=True, slots=True)
class Warm:
    """A layer as its children find it. `files` are the segments that `weights` maps, by device and inode.

    `http` are the parts of a worker's HTTP side; a worker writes into the `Settings`, not into `Prepared`. Children of
    a `shared` layer belong to several containers, whose functions may not all have a right to the layer's model.
    """

    level: Level
    http: tuple[Prepared, Settings] | None = None
    known: KnownManifest | None = None
    weights: Weights | None = None
    loaded: AssembledModel | None = None
    files: tuple[tuple[int, int], ...] = ()
    shared: bool = False

    @classmethod
    def lang(cls, kinds: Sequence[str], *, lean: bool = True, shared: bool = False) -> Warm:
        """Import everything that a worker imports, and the code of models of these kinds, on one thread."""
        _one_thread()

        def load() -> None:
            import numpy.random  # noqa: F401  numpy imports it at first use only

            from runtime.engine import choice, serial  # noqa: F401
            from runtime.handoff import handoffs  # noqa: F401
            from runtime.worker import weights

            for kind in kinds:
                weights.preload_kind(kind)

        gc.disable()
        imports.imported(load, lean=lean)
        from runtime.worker.worker import log_to_stderr

        log_to_stderr("info")
        http = _http()
        _lay_out_once()
        return cls("lang", http, shared=shared)

    def with_model(self, size: int, manifest: int, *segments: int) -> Warm:
        """Return the layer on top: the model of this manifest (an fd, and its size in bytes) on these segments.

        The fds are closed. The mappings stay, also when the agent ends.
        """
        from cache_agent.client.lease import KnownManifest
        from runtime.worker.weights import Weights, assemble

        files = _files(segments)
        known = KnownManifest(manifest, size)
        weights = Weights(_Lent(known.manifest, segments))
        for fd in (manifest, *segments):
            os.close(fd)
        loaded = assemble(weights)
        _forward_once(loaded.model)
        return replace(self, level="model", known=known, weights=weights, loaded=loaded, files=files)

    def rehearse(self) -> Iterator[None]:
        """Warm up a child that has time, in pieces of a few ms, after each of which the caller may stop.

        Requests are sent once more, so that pages which they write to are the child's own; pages of the weights are
        entered into the page table.
        """
        if self.http is not None:
            _ask(*self.http)
            yield
        if self.weights is not None:
            yield from self.weights.populate()

    def parts(self, lease: Lease) -> tuple[Weights, AssembledModel] | None:
        """Return the model that is ready, if its bytes are the very ones of this lease."""
        if self.weights is None or self.loaded is None:
            return None
        same = self.weights.manifest.source == lease.manifest.source
        if not same or self.files != _files(lease.segments):
            return None
        return self.weights, self.loaded


def _files(fds: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((found.st_dev, found.st_ino) for found in map(os.fstat, fds))


def _one_thread() -> None:
    """Have libraries compute on one thread: a child of a process that ever computed on two hangs.

    Must be called before torch is imported.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not open it


def _http() -> tuple[Prepared, Settings]:
    """Return the parts of a worker's HTTP side, after requests have gone through it as they would come from a socket.

    At the first request gunicorn and Flask import modules and fill caches.
    """
    from cache_agent.web.wsgi import Settings
    from runtime.http import server  # noqa: F401  imported for the children
    from runtime.http.application import prepare

    prepared, settings = prepare(), Settings()
    _ask(prepared, settings)
    return prepared, settings


def _ask(prepared: Prepared, settings: Settings) -> None:
    """Send requests through gunicorn's parser, the Flask application and a handler."""
    from gunicorn.http import RequestParser

    from cache_agent.ledger import Ledger
    from runtime.config import FunctionConfig
    from runtime.function.handler import Handler
    from runtime.http.application import Application
    from runtime.http.lifecycle import Lifecycle

    lifecycle = Lifecycle("warm", 1)
    config = FunctionConfig(model="/warm")
    application = Application(config, lifecycle, Ledger("warm"), lambda _reason: None, prepared=prepared)
    nobody: Any = SimpleNamespace(sessions=None)
    lifecycle.opened(nobody, Handler(lambda event, _context: f"{event.body!r} {dict(event.query)}"))
    for method, path in (("GET", "/_/health"), ("GET", "/_/ledger"), ("GET", "/_/absent"), ("POST", "/")):
        head = f"{method} {path}?a=b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"
        asked = next(RequestParser(settings.config, iter([head.encode()]), ("127.0.0.1", 1)))
        environ: dict[str, Any] = {
            "REQUEST_METHOD": asked.method, "PATH_INFO": asked.path, "SCRIPT_NAME": "", "QUERY_STRING": asked.query,
            "SERVER_NAME": "localhost", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "localhost",
            "CONTENT_LENGTH": "1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": asked.body,
            "wsgi.errors": io.StringIO(), "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
        }  # fmt: skip
        answer = application(environ, lambda *_: None)
        for _ in answer:
            pass
        getattr(answer, "close", lambda: None)()


def _lay_out_once() -> None:
    """Compute once without data: for the first such computation torch imports sympy, which takes 0.3 s."""
    import torch

    with torch.device("meta"):
        _ = 1.0 / torch.arange(2).float()


def _forward_once(model: Any) -> None:
    """Make two passes, a prompt's and one token's, as the worker's engine will make them."""
    import torch

    from runtime.engine.attention import Pack, Unbatchable, forward, install
    from runtime.engine.rows import Rows

    torch.set_num_threads(1)
    with torch.inference_mode():
        try:
            rows = Rows(install(model), _PROMPT + 1)
        except Unbatchable:  # the worker meets the same error, and says why
            for count in (_PROMPT, 1):
                model(input_ids=torch.zeros((1, count), dtype=torch.long), use_cache=False)
            return
        for count in (_PROMPT, 1):
            pack = Pack([(rows, count)])
            forward(
                model, [0] * count, range(rows.fed, rows.fed + count), pack, logits_to_keep=torch.tensor([count - 1])
            )
