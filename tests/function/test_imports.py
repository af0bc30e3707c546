"""The lean way to import torch and transformers: what it leaves out, that it computes the same, and what undoes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("torch")

BEGIN = """
import json, logging, os, sys
logging.basicConfig(stream=sys.stderr)
sys.path.insert(0, {root!r} + "/tests/function")
from runtime import imports
def load():
    from runtime import weights
    from runtime.engine import choice, serial
    weights.preload_kind("llama")
told = {{}}
"""


def _run(code: str, **environment: str) -> tuple[dict[str, Any], str]:
    """What a new interpreter has in `told` after `code`, and what it logged."""
    text = f"{BEGIN.format(root=str(ROOT))}\n{code}\nprint(json.dumps(told))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told, done.stderr


MODEL = """
import torch, tiny
from runtime.engine.attention import install
from runtime.skeleton import skeleton
told["sympy"] = {}
for architecture in ("llama", "qwen2", "mistral"):
    model = tiny.tiny(architecture)
    assert all(each.is_meta for each in skeleton(type(model), model.config).parameters())
    install(model)
    told["sympy"][architecture] = "sympy" in sys.modules
for architecture in tiny.ARCHITECTURES:
    model = tiny.tiny(architecture)
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        told[architecture] = model(input_ids=ids).logits.double().sum().item()
    told[architecture + " generates"] = tiny.greedy_reference(model, tiny.PROMPT, 8)
"""


THREADS = """
import threading
import torch._dynamo as early
assert "torch._dynamo.eval_frame" not in sys.modules
barrier, found = threading.Barrier(8), []
def want():
    barrier.wait()
    found.append(early.optimize)
threads = [threading.Thread(target=want) for _ in range(8)]
for each in threads: each.start()
for each in threads: each.join(60)
told["found"] = [len(found), len(set(map(id, found)))]
"""


def test_it_leaves_out_what_serving_does_not_need_and_computes_the_same() -> None:
    """And threads that then want what was put off at once get the same."""
    lean, log = _run("imports.imported(load)\ntold['loaded'] = sorted(sys.modules)" + MODEL + THREADS)
    assert lean.pop("found") == [8, 1]
    plain, _ = _run("imports.imported(load, lean=False)\ntold['loaded'] = sorted(sys.modules)" + MODEL)
    assert "failed" not in log
    # Nor does putting a model together, and taking its attention over.
    assert lean.pop("sympy") == {"llama": False, "qwen2": False, "mistral": False}
    del plain["sympy"]
    left_out = {"sympy", "torch.distributed.tensor", "torch._inductor", "torch._dynamo.eval_frame"}
    assert not left_out & set(lean.pop("loaded"))
    assert left_out <= set(plain.pop("loaded")), "this transformers does not import them anyway: the lean way is idle"
    assert lean == plain


def test_what_was_put_off_is_there_for_whoever_wants_it() -> None:
    """torch.compile, and imports from inside of the package, before anybody asked for the package itself."""
    told, _ = _run("""
imports.imported(load)
import torch
marked = torch._dynamo.assume_constant_result(lambda: 3)
kept = torch.compiler.disable(lambda x: x + (100 if torch.compiler.is_compiling() else 1))
told["before"] = [kept(1), "torch._dynamo.eval_frame" in sys.modules]
from torch._dynamo.utils import counters
import torch._dynamo
told["one"] = sys.modules["torch._dynamo.utils"].counters is counters is torch._dynamo.utils.counters
told["marked"] = marked._dynamo_marked_constant
told["real"] = type(sys.modules["torch._dynamo"]).__name__, hasattr(torch._dynamo, "_trace_wrapped_higher_order_op")
@torch.compile(backend="eager")
def compiled(x):
    return kept(x) * 2 + marked()
told["compiled"] = compiled(torch.ones(2)).tolist()
""")
    assert told == {
        "before": [2, False],
        "one": True,
        "marked": True,
        "real": ["module", True],
        "compiled": [7.0, 7.0],
    }


def test_another_layout_of_transformers_is_imported_as_it_stands() -> None:
    told, log = _run("""
changed = imports._change_probes
def broken(probes):
    changed(probes)
    probes.is_torch_distributed_available = None
imports._change_probes = broken
imports.imported(load)
from runtime import weights
import transformers
told["distributed"] = transformers.utils.import_utils.is_torch_distributed_available()
told["one"] = weights.AutoConfig is transformers.AutoConfig
""")
    assert "the lean way failed" in log
    assert told == {"distributed": True, "one": True}


def test_what_transformers_defines_is_remembered_and_asked_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the package: a folder of models, and a scan that counts."""
    package = tmp_path / "transformers"
    (package / "models" / "llama").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    from runtime.worker import imports

    asked: list[Path] = []

    def scan(path: Any) -> Any:
        asked.append(Path(path))
        return {"llama": {frozenset({"torch"}): {"modeling_llama": {"LlamaModel"}}}}

    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    structure = imports.Structure(scan, package, tmp_path / "cache")
    found = structure(package / "models")
    assert structure(package / "models" / "__init__.py") == found
    assert structure(package / "models" / "llama") == found["llama"]
    assert len(asked) == 1
    assert imports.Structure(scan, package, tmp_path / "cache")(package / "models") == found
    assert len(asked) == 1, "another process finds the file"
    (package / "models" / "new").mkdir()
    imports.Structure(scan, package, tmp_path / "cache")(package / "models")
    assert len(asked) == 2, "the folder has changed"
    (tmp_path / "cache").joinpath(next(os.scandir(tmp_path / "cache")).name).write_bytes(b"\\x00 damaged")
    assert imports.Structure(scan, package, tmp_path / "cache")(package / "models") == found
