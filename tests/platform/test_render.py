"""`glowplug render`: the platform's objects for a function, against golden files and the platforms' rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from runtime.cli import main
from runtime.commands import objects
from runtime.config import from_environment
from runtime.errors import BadConfig

ROOT = Path(__file__).parents[2]
CHAT: dict[str, Any] = {"name": "chat", "image": "registry.example.com/team/chat:1", "model": "s3://models/qwen2-0.5b"}
EXAMPLES = {
    "function.yaml": [],
    "function-fields.yaml": [
        *("--inject", "fields", "--scheduler", "warm-scheduler"),
        *("--token-secret", "glowplug-token", "--retention", "10m"),
    ],
}


def rendered(platform: str, *options: str) -> str:
    arguments = ["render", "chat", "--platform", platform, "--image", CHAT["image"], "--model", CHAT["model"]]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_it_prints(name: str, pytestconfig: pytest.Config) -> None:
    path = ROOT / "knative" / "examples" / name
    text = rendered("knative", *EXAMPLES[name])
    if pytestconfig.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("name", "platform", "options"),
    [
        ("knative-full", "knative", {"namespace": "llm", "min_scale": 1, "max_scale": 8, "environment": {"A": "b: c"}}),
        ("knative-none", "knative", {"inject": "none", "slots": 16, "timeout": 600, "memory": "24Gi"}),
        ("knative-tcp", "knative", {"inject": "tcp", "token_secret": "token"}),
        ("openfaas-tcp", "openfaas", {"inject": "tcp", "token_secret": "token"}),
        ("openfaas", "openfaas", {}),
        ("openfaas-full", "openfaas", {"namespace": "llm", "token_secret": "token", "max_scale": 4, "timeout": 60}),
    ],
)
def test_objects(name: str, platform: str, options: dict[str, Any], golden: Callable[[str, Any], None]) -> None:
    function = objects.Function(**CHAT, **options)
    golden(f"platform/render-{name}.json", getattr(objects, platform)(function))


def spec(**options: Any) -> dict[str, Any]:
    (service,) = objects.knative(objects.Function(**CHAT, **options))
    return dict(service["spec"]["template"]["spec"])


def settings(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


@pytest.mark.parametrize("slots", [1, 7])
def test_concurrency_follows_the_slots(slots: int) -> None:
    found = spec(slots=slots)
    assert found["containerConcurrency"] == slots == from_environment(settings(found["containers"][0])).slots


@pytest.mark.parametrize("timeout", [50, 300, 600])
def test_a_function_ends_before_the_platform_ends_it(timeout: int) -> None:
    """On Knative SIGTERM comes 30 s after the last request arrived, and the pod has `timeoutSeconds` in all."""
    found = spec(timeout=timeout)
    config = from_environment(settings(found["containers"][0]))
    assert 30 + config.drain_linger + config.drain_grace < found["timeoutSeconds"] == timeout
    assert found["responseStartTimeoutSeconds"] <= timeout  # Knative refuses more
    assert 0 < config.answer_limit < timeout
    if timeout > 50:
        (stack,) = objects.openfaas(objects.Function(**CHAT, timeout=timeout))
        entry = stack["functions"]["chat"]["environment"]
        config = from_environment(entry)
        assert config.drain_linger > int(entry["healthcheck_interval"].removesuffix("s"))
        assert config.drain_linger + config.drain_grace < timeout
        assert 0 < config.answer_limit < int(entry["write_timeout"].removesuffix("s"))


def test_probes_are_those_that_knative_sends_itself() -> None:
    """A startup or exec probe, or a period, would have the kubelet probe instead, once a second at best."""
    (container,) = spec()["containers"]
    assert container["readinessProbe"] == {"httpGet": {"path": "/_/ready"}, "periodSeconds": 0, "successThreshold": 1}
    assert container["livenessProbe"]["httpGet"] == {"path": "/_/health"}, "it must not depend on the model"
    assert "startupProbe" not in container
    assert from_environment(settings(container)).host == "0.0.0.0"


def test_openfaas_gets_what_every_edition_takes() -> None:
    stack = yaml.safe_load(rendered("openfaas", "--max-scale", "3"))
    (function,) = stack["functions"].values()
    for label in function["labels"]:
        assert label not in {f"com.openfaas.scale.{name}" for name in ("zero", "zero-duration", "target", "type")}
    assert not {"constraints", "devices"} & function.keys()
    assert all(isinstance(value, str) for value in function["environment"].values())


def test_replicas_take_over_each_others_requests_where_there_can_be_several() -> None:
    def names(**options: Any) -> set[str]:
        function = objects.Function(**CHAT, **options)
        (stack,) = objects.openfaas(function)
        found = [settings(spec(**options)["containers"][0]), stack["functions"]["chat"]["environment"]]
        return {from_environment(environment).handoff_name for environment in found}

    assert names(max_scale=3) == names(min_scale=2) == {"chat"}
    assert names(max_scale=3, namespace="llm") == {"llm/chat"}
    assert names() == names(max_scale=1) == {""}, "whether there are several is the platform's own choice"
    assert names(max_scale=3, inject="none") == {""}, "each has an agent of its own"
    assert names(max_scale=3, inject="tcp", token_secret="t") == {""}, "no pipe can be passed to it"
    assert names(max_scale=3, environment={"GLOWPLUG_HANDOFF": "off"}) == {""}


def test_the_image_runs_both_ways(template: Path) -> None:
    """The same image: its command starts the watchdog, Knative's the static shim, which starts what that would."""
    (container,) = spec()["containers"]
    (program,) = container["command"]
    assert f"/usr/local/bin/{program}\n" in (template / "Dockerfile").read_text()


def test_what_is_rendered_is_what_was_said() -> None:
    """No text of a developer becomes structure."""
    hostile = 'a"\n  evil: [true]\n# {{x}} ${Y}: &a *a !!python/object'
    text = rendered("knative", "--env", f"NOTE={hostile}", "--env", "EMPTY=")
    (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    assert settings(container)["NOTE"] == hostile
    assert settings(container)["EMPTY"] == ""


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "Chat"}, "name 'Chat'"),
        ({"name": "c" * 64}, "63 at most"),
        ({"name": ""}, "name ''"),
        ({"namespace": "a/b"}, "namespace"),
        ({"image": ""}, "image"),
        ({"image": "a b"}, "image"),
        ({"model": "models/a"}, "neither a URI"),
        ({"model": "://x"}, "://x"),
        ({"memory": "4 GB"}, "--memory"),
        ({"cpu": "one"}, "--cpu"),
        ({"retention": "10"}, "--retention"),
        ({"slots": 0}, "at least 1"),
        ({"min_scale": 3, "max_scale": 2}, "below --min-scale"),
        ({"timeout": 601}, "600 at most"),
        ({"timeout": 49}, "below 50"),
        ({"environment": {"GLOWPLUG_SLOTS": "3"}}, "an option sets it"),
        ({"environment": {"A=B C": "3"}}, "no name of a variable"),
        ({"inject": "maybe"}, "policy, fields, tcp or none"),
        ({"inject": "tcp"}, "needs --token-secret"),
    ],
)
def test_nonsense_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        objects.knative(objects.Function(**{**CHAT, **options}))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"retention": "1m"}, "Pro"),
        ({"inject": "fields"}, "no edition"),
        ({"timeout": 14}, "14"),
    ],
)
def test_openfaas_has_no_word_for(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        objects.openfaas(objects.Function(**CHAT, **options))


def test_the_command_reports_an_error_with_its_code() -> None:
    result = CliRunner().invoke(
        main, ["render", "Chat", "--platform", "knative", "--image", "a", "--model", "s3://a/b"]
    )
    assert (result.exit_code, "[bad_config]" in result.output) == (64, True)
    assert re.search(r"name 'Chat'", result.output)


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import runtime.commands.objects, yaml; print(runtime.commands.objects.MODEL_ANNOTATION)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
