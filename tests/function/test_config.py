"""The function's settings: every variable, every refusal, and the command line that sets them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from runtime.commands import serve
from runtime.config import _GONE, FunctionConfig, from_environment, gone
from runtime.errors import BadConfig

NAMES = [field.name for field in fields(FunctionConfig)]
CHOICES = {name: (text, text) for name, text in {"log_level": "debug", "layers": "off", "hold": "user=1"}.items()}
OTHER = {"str": ("elsewhere", "elsewhere"), "int": ("7", 7), "float": ("7.5", 7.5), "bool": ("1", True)}


def test_an_empty_environment_gives_the_defaults() -> None:
    assert from_environment({}) == FunctionConfig()


@pytest.mark.parametrize("field", fields(FunctionConfig), ids=lambda field: field.name)
def test_every_field_has_a_variable(field: object) -> None:
    text, value = CHOICES.get(field.name) or OTHER[field.type]  # type: ignore[attr-defined]
    config = from_environment({f"GLOWPLUG_{field.name.upper()}": text})  # type: ignore[attr-defined]
    assert getattr(config, field.name) == value  # type: ignore[attr-defined]
    others = [name for name in NAMES if name != field.name]  # type: ignore[attr-defined]
    assert all(getattr(config, name) == getattr(FunctionConfig(), name) for name in others)


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert from_environment({"GLOWPLUG_SLOTS": "", "PORT": ""}) == FunctionConfig()


def test_port_is_what_platforms_set_and_ours_goes_first() -> None:
    assert from_environment({"PORT": "9000"}).port == 9000
    assert from_environment({"PORT": "9000", "GLOWPLUG_PORT": "9001"}).port == 9001


@pytest.mark.parametrize("text", ["1", "true", "YES", " true "])
def test_true(text: str) -> None:
    assert from_environment({"GLOWPLUG_PRIVATE_WEIGHTS": text}).private_weights


@pytest.mark.parametrize("text", ["0", "false", "No"])
def test_false(text: str) -> None:
    assert not from_environment({"GLOWPLUG_PRIVATE_WEIGHTS": text}).private_weights


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PORT", "http"),
        ("PORT", "70000"),
        ("GLOWPLUG_PORT", "-1"),
        ("GLOWPLUG_SLOTS", "many"),
        ("GLOWPLUG_SLOTS", "0"),
        ("GLOWPLUG_SLOTS", "2.5"),
        ("GLOWPLUG_QUEUE", "-1"),
        ("GLOWPLUG_HANDLER_CONCURRENCY", "-1"),
        ("GLOWPLUG_MAX_BODY", "0"),
        ("GLOWPLUG_PRIVATE_WEIGHTS", "maybe"),
        ("GLOWPLUG_THREADS", "-1"),
        ("GLOWPLUG_START_TIMEOUT", "soon"),
        ("GLOWPLUG_START_TIMEOUT", "0"),
        ("GLOWPLUG_START_TIMEOUT", "nan"),
        ("GLOWPLUG_START_TIMEOUT", "inf"),
        ("GLOWPLUG_DRAIN_LINGER", "-1"),
        ("GLOWPLUG_DRAIN_LINGER", "nan"),
        ("GLOWPLUG_DRAIN_GRACE", "-0.5"),
        ("GLOWPLUG_DRAIN_GRACE", "inf"),
        ("GLOWPLUG_WORKER_TIMEOUT", "0.5"),
        ("GLOWPLUG_WORKER_TIMEOUT", "nan"),
        ("GLOWPLUG_LOG_LEVEL", "loud"),
    ],
)
def test_a_senseless_value_is_refused_by_name(variable: str, text: str) -> None:
    with pytest.raises(BadConfig) as caught:
        from_environment({variable: text})
    assert variable.removeprefix("GLOWPLUG_") in caught.value.text
    assert text in caught.value.text
    assert len(caught.value.text.split()) >= 5, "a sentence that says what would do"


def test_a_former_setting_is_named_and_harms_nobody() -> None:
    environment = {"GLOWPLUG_CHUNK": "0", "GLOWPLUG_CHECKPOINT_TOKENS": "", "GLOWPLUG_SLOTS": "2"}
    assert from_environment(environment) == FunctionConfig(slots=2)
    (text,) = gone(environment)
    assert text.startswith("GLOWPLUG_CHUNK is no setting any more")
    assert not {variable.removeprefix("GLOWPLUG_").lower() for variable in _GONE} & set(NAMES)


def test_no_model_is_refused_when_it_is_asked_for() -> None:
    with pytest.raises(BadConfig, match="GLOWPLUG_MODEL is not set"):
        _ = FunctionConfig().model_uri


def test_a_model_can_be_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert FunctionConfig(model="models/a").model_uri == f"file://{tmp_path}/models/a"
    assert FunctionConfig(model="/models/a").model_uri == "file:///models/a"
    assert FunctionConfig(model="s3://bucket/a").model_uri == "s3://bucket/a"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("s3://bucket/llama", "llama"),
        ("s3://bucket/llama/", "llama"),
        ("file:///models/qwen@rev-0123", "qwen"),
        ("models/gpt2", "gpt2"),
    ],
)
def test_the_served_name_is_the_last_part_of_the_uri(model: str, name: str) -> None:
    assert FunctionConfig(model=model).served_name == name


def test_a_name_goes_before_the_uri() -> None:
    assert FunctionConfig(model="s3://bucket/llama", name="mine").served_name == "mine"


def test_handlers_run_as_many_as_there_are_slots() -> None:
    assert FunctionConfig(slots=3).concurrent_handlers == 3
    assert FunctionConfig(slots=3, handler_concurrency=1).concurrent_handlers == 1


def test_the_token_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("  secret\n")
    assert FunctionConfig(token_file=str(file)).token() == "secret"
    assert FunctionConfig().token() == ""


def test_a_secret_that_is_mounted_as_a_directory_is_read_all_the_same(tmp_path: Path) -> None:
    """OpenFaaS mounts secrets/x; what `faas-cli generate` writes for Knative mounts secrets/x/x."""
    (tmp_path / "token").mkdir()
    (tmp_path / "token" / "token").write_text("secret\n")
    assert FunctionConfig(token_file=str(tmp_path / "token")).token() == "secret"
    assert FunctionConfig(token_file=f"{tmp_path}/token/").token() == "secret"
    (tmp_path / "token" / "token").unlink()
    with pytest.raises(BadConfig, match="GLOWPLUG_TOKEN_FILE"):
        FunctionConfig(token_file=str(tmp_path / "token")).token()


def test_a_token_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", "binary", "."):
        with pytest.raises(BadConfig, match="GLOWPLUG_TOKEN_FILE="):
            FunctionConfig(token_file=str(tmp_path / name)).token()


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        FunctionConfig().slots = 2  # type: ignore[misc]


def test_every_option_of_the_command_line_sets_a_field() -> None:
    options = {option.name for option in serve.serve.params} - {"folder", "follow", "as_json"}
    assert options == set(serve.OPTIONS)
    variables = {f"GLOWPLUG_{name.upper()}" for name in NAMES}
    assert set(serve.OPTIONS.values()) <= variables
