"""The models that `scripts/make_tiny_model` makes: the committed one talks sense, random ones load and repeat."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "templates" / "llm-python" / "model"
# scripts/ is no package; appended, so that nothing there can shadow a library.
sys.path.append(str(ROOT / "scripts"))

from tiny_model import __main__ as command_line  # noqa: E402
from tiny_model import corpus, tokenizer, training  # noqa: E402
from tiny_model.random_checkpoint import random_checkpoint  # noqa: E402

ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt2")


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def load(folder: Path) -> Any:
    """The model, after checking that no weight was missing, left over or of another shape."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return load(COMMITTED)


@pytest.fixture(scope="module")
def codec() -> Any:
    return transformers.AutoTokenizer.from_pretrained(COMMITTED)


class TestCommittedModel:
    @staticmethod
    def answer(model: Any, codec: Any, *messages: dict[str, str]) -> str:
        """The greedy answer, which must end by itself."""
        prompt = codec.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        whole = model.generate(**prompt, max_new_tokens=200, do_sample=False)[0]
        said = whole[prompt["input_ids"].shape[1] :].tolist()
        assert said[-1] == codec.eos_token_id
        return str(codec.decode(said[:-1]))

    def test_is_small_and_complete(self) -> None:
        names = {file.name for file in COMMITTED.iterdir()}
        assert names == {
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert sum(file.stat().st_size for file in COMMITTED.iterdir()) <= 5_000_000

    @pytest.mark.parametrize(
        ("question", "keyword"),
        [
            ("What is Glowplug?", "functions"),
            ("Hello", "Glowplug"),
            ("Who are you?", "Llama"),
            ("Why are cold starts slow?", "weights"),
            ("What does the cache agent do?", "node"),
            ("What is a zygote?", "process"),
            ("What is a lease?", "agent"),
            ("What is a snapshot?", "answer"),
            ("What does the shim do?", "port"),
            ("How do I make a function?", "handler.py"),
            ("How do I choose a model?", "GLOWPLUG_MODEL"),
            ("What is the capital of France?", "sorry"),
        ],
    )
    def test_answers(self, model: Any, codec: Any, question: str, keyword: str) -> None:
        answer = self.answer(model, codec, {"role": "user", "content": question})
        assert keyword in answer
        assert len(answer.split()) > 8
        assert answer[0].isupper()
        assert answer.endswith(".")

    def test_answers_most_of_its_questions_word_for_word(self, model: Any, codec: Any) -> None:
        entries = corpus.entries()
        wrong = [entry.questions[0] for entry in entries if not training.knows(model, codec, entry)]
        assert len(wrong) <= len(entries) // 10, wrong

    def test_answers_after_other_messages(self, model: Any, codec: Any) -> None:
        answer = self.answer(
            model,
            codec,
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "what is glowplug"},
        )
        assert "start warm" in answer

    def test_chat_template(self, codec: Any) -> None:
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": " spaces stay\n"},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "42"},
        ]
        assert codec.apply_chat_template(messages, tokenize=False) == (
            "<|system|>Be brief.<|end|><|user|> spaces stay\n<|end|><|assistant|><|end|><|user|>42<|end|>"
        )
        assert codec.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True).endswith(
            "<|end|><|assistant|>"
        )


class TestTraining:
    @pytest.fixture
    def torch_settings(self) -> Iterator[None]:
        """Training sets them for its whole process."""
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        yield
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = True

    @pytest.mark.usefixtures("torch_settings")
    def test_same_seed_same_bytes(self, tmp_path: Path) -> None:
        """Here and in another process, whose strings hash in another way."""
        (tmp_path / "README.md").write_text("# Title\n\nA glow plug warms a cold engine, so that it starts at once.\n")
        program = """
import sys
from pathlib import Path
from tiny_model.training import train

root = Path(sys.argv[1])
train(root, root / "two", seed=3, steps=2, threads=1, report=lambda line: None)
"""
        env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "PYTHONHASHSEED": "1"}
        other = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=env)
        for name, seed in (("one", 3), ("other", 4)):
            training.train(tmp_path, tmp_path / name, seed=seed, steps=2, threads=1, report=lambda line: None)
        assert other.wait(100) == 0
        one, other = digests(tmp_path / "one"), digests(tmp_path / "other")
        assert digests(tmp_path / "two") == one
        assert one["tokenizer.json"] == other["tokenizer.json"]
        assert one["model.safetensors"] != other["model.safetensors"]
        assert (tmp_path / "one" / "model.safetensors").stat().st_mode & 0o777 == 0o644

    def test_corpus_is_prose(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(
            "# A heading that is long enough to be taken for a paragraph of its own\n\n"
            "Some *prose* with `code` and a [link](https://example.org), which goes on\nin a second line.\n\n"
            "```console\n$ this is not prose, whatever it looks like to you\n```\n\n"
            "| a table | is none | either |\n|---|---|---|\n\n- short\n"
        )
        package = tmp_path / "runtime"
        package.mkdir()
        (package / "x.py").write_text('"""A docstring of a module, which is long enough.\n\n    a ──► b\n"""\n')
        assert corpus.paragraphs(tmp_path) == [
            "A heading that is long enough to be taken for a paragraph of its own",
            "Some prose with code and a link, which goes on in a second line.",
            "A docstring of a module, which is long enough.",
        ]

    def test_questions_are_unambiguous(self) -> None:
        questions = [question for entry in corpus.entries() for question in entry.questions]
        assert len(questions) > 300
        assert sorted(questions) == sorted(set(questions))

    @pytest.mark.parametrize("block", ["Q: one\nQ: two\n", "A: alone\n", "Q: q\nA: a\nA: b\n", "Q: q\nA: a\nmore\n"])
    def test_broken_questions(self, tmp_path: Path, block: str) -> None:
        (tmp_path / "q.txt").write_text("# comment\n\nQ: fine\nA: yes\n\n" + block)
        with pytest.raises(ValueError, match="one A: line"):
            corpus.entries(tmp_path / "q.txt")


class TestRandom:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("dtype", ["bf16", "f32"])
    def test_loads(self, tmp_path: Path, arch: Any, tied: bool, dtype: Any) -> None:
        random_checkpoint(tmp_path, arch=arch, dtype=dtype, tied=tied)
        model = load(tmp_path)
        codec = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert type(model).__name__.lower().startswith(arch)
        assert model.dtype == {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        assert len(codec) == model.config.vocab_size
        assert model.generation_config.eos_token_id == codec.eos_token_id
        prompt = codec.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**prompt, max_new_tokens=16, min_new_tokens=16)[0, -16:].tolist()
        assert len(set(said)) > 2, "random, but not stuck"
        assert codec.decode(said)

    @pytest.mark.parametrize("shards", [1, 2, 5])
    def test_shards(self, tmp_path: Path, shards: int) -> None:
        random_checkpoint(tmp_path / "whole", arch="llama", layers=5)
        random_checkpoint(tmp_path / "parts", arch="llama", layers=5, shards=shards)
        files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
        assert len(files) == shards
        assert len(load(tmp_path / "parts").model.layers) == 5
        index = tmp_path / "parts" / "model.safetensors.index.json"
        assert index.exists() == (shards > 1)
        if shards > 1:
            assert sorted(set(json.loads(index.read_text())["weight_map"].values())) == files
        for name, weight in load(tmp_path / "whole").state_dict().items():
            assert torch.equal(weight, load(tmp_path / "parts").state_dict()[name])

    def test_every_tensor_may_have_its_own_shard(self, tmp_path: Path) -> None:
        tensors = 2 * 9 + 3
        random_checkpoint(tmp_path / "most", arch="mistral", shards=tensors)
        load(tmp_path / "most")
        with pytest.raises(ValueError, match="21 tensors cannot be cut into 22 shards"):
            random_checkpoint(tmp_path / "more", arch="mistral", shards=tensors + 1)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_seed(self, tmp_path: Path, arch: Any) -> None:
        for name, seed in (("one", 1), ("two", 1), ("other", 2)):
            random_checkpoint(tmp_path / name, arch=arch, shards=2, seed=seed)
        one, other = digests(tmp_path / "one"), digests(tmp_path / "other")
        assert digests(tmp_path / "two") == one
        assert {name for name in one if one[name] != other[name]} == {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }

    def test_overwrites_another_checkpoint(self, tmp_path: Path) -> None:
        random_checkpoint(tmp_path, arch="gpt2", shards=3)
        random_checkpoint(tmp_path, arch="llama")
        assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
        load(tmp_path)

    def test_the_sliding_window_matters(self, tmp_path: Path) -> None:
        random_checkpoint(tmp_path, arch="mistral", dtype="f32")
        model = load(tmp_path)
        window = model.config.sliding_window
        assert window < model.config.max_position_embeddings
        # Two layers see back twice as far as one.
        first = torch.arange(3 * window)[None] % 200 + 100
        second = first.clone()
        second[0, 0] = 7
        with torch.inference_mode():
            one, two = model(first).logits[0], model(second).logits[0]
        assert not torch.equal(one[window - 1], two[window - 1])
        assert torch.equal(one[-1], two[-1])

    def test_command_line(self, tmp_path: Path) -> None:
        command = [ROOT / "scripts" / "make_tiny_model", "random", "--arch", "qwen2", "--size", "125m", "--layers", "1"]
        done = subprocess.run(
            [*command, "--shards", "2", "--tied", "--out", tmp_path / "new" / "model"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("in 2 shard(s)\n")
        config = json.loads((tmp_path / "new" / "model" / "config.json").read_text())
        assert (config["num_hidden_layers"], config["hidden_size"], config["tie_word_embeddings"]) == (1, 768, True)

    def test_command_line_says_what_is_wrong(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(command_line.main, ["random", "--shards", "99", "--out", str(tmp_path)])
        assert done.exit_code == 2
        assert done.stderr.endswith("tensors cannot be cut into 99 shards\n")


class TestSyntheticTokenizer:
    def test_every_id_has_a_text(self) -> None:
        codec = tokenizer.synthetic(2000)
        assert len(codec) == 2000
        assert all(codec.decode([number]) for number in range(2000))
        text = "naïve  text — 漢字 🙂\n"
        assert codec.decode(codec.encode(text)) == text

    def test_too_small(self) -> None:
        with pytest.raises(ValueError, match="at least 261"):
            tokenizer.synthetic(260)
