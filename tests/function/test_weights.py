"""Leased weights become transformers' model: bit for bit what from_pretrained gives, without a copy."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from runtime.errors import ModelUnusable, SharedWeightsError  # noqa: E402
from runtime.worker.weights import AssembledModel, Weights, assemble  # noqa: E402

ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt2")
IDS = torch.tensor([[5, 17, 99, 300, 42, 7, 7, 255]])


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _reference(directory: Path) -> Any:
    """from_pretrained, its parameters cloned to fresh memory: on unaligned maps torch differs in the last bit."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    tied: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in tied:
                    tied[id(parameter)] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module._parameters[name] = tied[id(parameter)]
    return model


def _logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def _assert_same(loaded: AssembledModel, directory: Path) -> None:
    reference = _reference(directory)
    assert type(loaded.model) is type(reference)
    assert {p.dtype for p in loaded.model.parameters()} == {p.dtype for p in reference.parameters()}
    expected, found = _logits(reference), _logits(loaded.model)
    assert expected.dtype == found.dtype
    assert torch.equal(expected, found), (expected - found).abs().max()
    assert expected.float().std() > 0, "a model that says something"
    assert not loaded.model.training


def _shared(weights: Weights, model: Any) -> list[str]:
    """Names of parameters that are not in the leased memory."""
    return [name for name, parameter in model.named_parameters() if not weights.guard.shares(parameter)]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_those_of_from_pretrained(
    arch: str,
    dtype: str,
    tied: bool,
    shards: int,
    tmp_path: Path,
    random_checkpoint: Callable[..., Path],
    lease: Callable[..., Any],
) -> None:
    directory = random_checkpoint(tmp_path / "m", arch=arch, dtype=dtype, tied=tied, shards=shards)
    weights = Weights(lease(_files(directory)))
    loaded = assemble(weights)
    assert loaded.how == "assigned"
    _assert_same(loaded, directory)
    assert _shared(weights, loaded.model) == []
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.model.parameters())
    head, embedding = loaded.model.get_output_embeddings().weight, loaded.model.get_input_embeddings().weight
    assert (head is embedding) is tied
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.fixture
def llama(tmp_path: Path, random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint(tmp_path / "llama", dtype="f32", tied=True)


def test_what_the_checkpoint_brings_along(llama: Path, lease: Callable[..., Any]) -> None:
    (llama / "generation_config.json").write_text('{"eos_token_id": [0, 3], "temperature": 0.5}')
    loaded = assemble(Weights(lease(_files(llama))))
    assert loaded.generation_config == {"eos_token_id": [0, 3], "temperature": 0.5}
    assert loaded.model.generation_config.eos_token_id == [0, 3]
    text = "Grüße, 你好"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_without_a_generation_config(llama: Path, lease: Callable[..., Any]) -> None:
    files = _files(llama)
    del files["generation_config.json"]
    assert assemble(Weights(lease(files))).generation_config == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_is_put_together_while_its_bytes_arrive(
    arch: str, tmp_path: Path, random_checkpoint: Callable[..., Path], lease: Callable[..., Any]
) -> None:
    directory = random_checkpoint(tmp_path / "m", arch=arch, dtype="bf16", tied=False)
    there = lease(_files(directory))
    empty = SimpleNamespace(manifest=there.manifest, segments=[os.memfd_create("empty") for _ in there.segments])
    for fd, size in zip(empty.segments, there.manifest.segments, strict=True):
        os.pwrite(fd, b"\xff" * size, 0)  # ones are NaN in every dtype
    waits: list[None] = []
    loaded = assemble(Weights(empty), whole=lambda: waits.append(None))
    assert waits == [], "names and shapes are enough"
    for fd, source, size in zip(empty.segments, there.segments, there.manifest.segments, strict=True):
        os.pwrite(fd, os.pread(source, size, 0), 0)
        os.close(fd)
    _assert_same(loaded, directory)


def test_bytes_that_are_copied_are_waited_for(llama: Path, lease: Callable[..., Any]) -> None:
    waits: list[None] = []
    assemble(Weights(lease(_files(llama))), private=True, whole=lambda: waits.append(None))
    assert waits == [None]


def test_weights_outlive_the_lease(llama: Path, lease: Callable[..., Any]) -> None:
    taken = lease(_files(llama))
    weights = Weights(taken)
    loaded = assemble(weights)
    before = _logits(loaded.model)
    taken.close()
    assert torch.equal(_logits(loaded.model), before)


def test_private_weights_are_a_copy_that_may_be_written(llama: Path, lease: Callable[..., Any]) -> None:
    weights = Weights(lease(_files(llama)))
    loaded = assemble(weights, private=True)
    _assert_same(loaded, llama)
    assert set(_shared(weights, loaded.model)) == {name for name, _ in loaded.model.named_parameters()}
    shared = weights.tensors["model.embed_tokens.weight"].clone()
    with weights.guard.scope():
        weights.guard.arm()
        loaded.model.get_input_embeddings().weight.zero_()
    assert not _logits(loaded.model).any()
    assert torch.equal(weights.tensors["model.embed_tokens.weight"], shared)


def test_the_guard_knows_every_parameter(llama: Path, lease: Callable[..., Any]) -> None:
    weights = Weights(lease(_files(llama)))
    model = assemble(weights).model
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    with weights.guard.scope():
        weights.guard.arm()
        for parameter in model.parameters():
            with pytest.raises(SharedWeightsError):
                parameter.add_(1)
        _logits(model)  # reading goes on as ever
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in before.items())


def test_two_leases_are_one_copy(tmp_path: Path, random_checkpoint: Callable[..., Path], weights_agent: Any) -> None:
    """The same inode is behind both."""
    client, uri = weights_agent.client, f"file://{random_checkpoint(tmp_path / 'llama', seed=9)}"
    with client.lease(uri) as first, client.lease(uri) as second:
        for each in (first, second):
            each.wait_ready(time.monotonic() + 60)
        inodes = [[os.fstat(fd).st_ino for fd in each.segments] for each in (first, second)]
        assert inodes[0] == inodes[1]
        assert torch.equal(_logits(assemble(Weights(first)).model), _logits(assemble(Weights(second)).model))


# --- what is left to from_pretrained ----------------------------------------------------------------------------------


def _rewrite(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return directory


def test_names_that_need_renaming(tmp_path: Path, random_checkpoint: Callable[..., Path], lease: Any) -> None:
    """The hub's GPT-2 has no `transformer.` before its names; from_pretrained knows, and so must we."""
    directory = random_checkpoint(tmp_path / "gpt2", arch="gpt2", dtype="f32")
    _rewrite(directory, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    loaded = assemble(Weights(lease(_files(directory))))
    assert loaded.how == "from_pretrained"
    _assert_same(loaded, directory)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_mixed_dtypes(arch: str, tmp_path: Path, random_checkpoint: Callable[..., Path], lease: Any) -> None:
    """Norms in f32 beside bf16: one dtype is what the config says, for everything."""
    directory = random_checkpoint(tmp_path / "m", arch=arch, dtype="bf16")
    _rewrite(directory, lambda tensors: {n: t.float() if t.dim() == 1 else t for n, t in tensors.items()})
    loaded = assemble(Weights(lease(_files(directory))))
    assert loaded.how == "from_pretrained"
    _assert_same(loaded, directory)


def test_another_dtype_than_the_config_says(llama: Path, lease: Callable[..., Any]) -> None:
    _rewrite(llama, lambda tensors: {name: t.to(torch.bfloat16) for name, t in tensors.items()})
    loaded = assemble(Weights(lease(_files(llama))))
    _assert_same(loaded, llama)


def test_a_tensor_too_many_is_ignored(llama: Path, lease: Callable[..., Any]) -> None:
    """Old checkpoints hold rotary frequencies, which the model computes itself."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    _rewrite(llama, lambda tensors: tensors | extra)
    _assert_same(assemble(Weights(lease(_files(llama)))), llama)


def test_a_head_that_is_stored_although_it_is_tied(llama: Path, lease: Callable[..., Any]) -> None:
    _rewrite(llama, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    _assert_same(assemble(Weights(lease(_files(llama)))), llama)


# --- what cannot be served --------------------------------------------------------------------------------------------


def _unusable(files: dict[str, bytes], lease: Callable[..., Any]) -> str:
    with pytest.raises(ModelUnusable) as caught:
        assemble(Weights(lease(files)))
    return caught.value.text


def test_missing_tensors(llama: Path, lease: Callable[..., Any]) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    _rewrite(llama, lambda tensors: {name: t for name, t in tensors.items() if name != gone})
    assert f"lacks 1 tensors of llama, such as {gone}" in _unusable(_files(llama), lease)


def test_a_tensor_of_another_shape(llama: Path, lease: Callable[..., Any]) -> None:
    _rewrite(llama, lambda t: t | {"model.norm.weight": torch.ones(63)})
    assert "model.norm.weight" in _unusable(_files(llama), lease)


def _with_config(directory: Path, **changes: Any) -> dict[str, bytes]:
    files = _files(directory)
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | changes).encode()
    return files


def test_an_architecture_that_transformers_does_not_have(llama: Path, lease: Callable[..., Any]) -> None:
    assert "from_the_future" in _unusable(_with_config(llama, model_type="from_the_future"), lease)


def test_a_model_that_is_no_causal_language_model(llama: Path, lease: Callable[..., Any]) -> None:
    text = _unusable(_with_config(llama, model_type="vit"), lease)
    assert "vit is no causal language model that this transformers version knows" in text


def test_code_of_the_checkpoints_own_is_never_run(llama: Path, lease: Callable[..., Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    files = _with_config(
        llama,
        model_type="custom",
        auto_map={"AutoConfig": "configuration_custom.Custom", "AutoModelForCausalLM": "modeling_custom.Custom"},
    )
    files["configuration_custom.py"] = f"open({str(ran)!r}, 'w')".encode()
    files["modeling_custom.py"] = files["configuration_custom.py"]
    assert _unusable(files, lease)
    assert not ran.exists()


def test_code_beside_a_known_architecture_is_never_run(llama: Path, lease: Any, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    files = _with_config(llama, auto_map={"AutoModelForCausalLM": "modeling_custom.Custom"})
    files["modeling_custom.py"] = f"open({str(ran)!r}, 'w')".encode()
    assert assemble(Weights(lease(files))).how == "assigned"
    assert not ran.exists()


def test_a_checkpoint_without_a_tokenizer(llama: Path, lease: Callable[..., Any]) -> None:
    files = {name: data for name, data in _files(llama).items() if "token" not in name}
    assert "from_pretrained loads without remote code" in _unusable(files, lease)


def test_a_config_that_is_no_json(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease: Any) -> None:
    """And nothing is left of the attempt."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    files = _files(llama) | {"tokenizer.json": b"{"}
    assert _unusable(files, lease)
    assert list((tmp_path / "t").iterdir()) == []
