"""Codes and exit codes are what programs and operators rely on: unique, stable, and each with a sentence."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import cache_agent
import runtime
from cache_agent import errors as agent_errors
from runtime import errors as function_errors
from runtime.function.handler import error_json

GOLDEN = Path(__file__).parents[1] / "golden" / "function" / "errors.json"


def _family(root: type[BaseException]) -> list[type[BaseException]]:
    found = [root]
    for child in root.__subclasses__():
        found += _family(child)
    return found


def _ours(root: type[BaseException], package: str) -> list[type[BaseException]]:
    return [cls for cls in _family(root) if cls.__module__.startswith(package)]


FUNCTION = _ours(function_errors.FunctionError, "runtime")
AGENT = _ours(agent_errors.AgentError, "cache_agent")


def test_every_error_is_in_the_errors_module() -> None:
    for package in (runtime, cache_agent):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name in ("errors", "config", "control", "lifecycle", "baseset", "protocol"):
                importlib.import_module(f"{package.__name__}.{module.name}")
    assert {cls.__module__ for cls in _ours(function_errors.FunctionError, "runtime")} == {"runtime.errors"}
    assert {cls.__module__ for cls in _ours(agent_errors.AgentError, "cache_agent")} == {"cache_agent.errors"}


def test_codes_of_the_function_are_unique() -> None:
    codes = [cls.code for cls in FUNCTION]
    assert len(set(codes)) == len(codes), codes


def test_codes_of_the_agent_are_unique_and_known_on_the_wire() -> None:
    classes = [cls for cls in AGENT if cls is not agent_errors.AgentError]
    codes = [cls.code for cls in classes]
    assert len(set(codes)) == len(codes), codes
    assert {cls.code: cls for cls in classes} == agent_errors.BY_CODE


def test_every_error_defines_a_code_of_its_own() -> None:
    inherited = [cls.__name__ for cls in (*FUNCTION, *AGENT) if "code" not in vars(cls)]
    assert not inherited


def test_exit_codes_are_unique_where_they_end_a_process() -> None:
    ending = [cls for cls in FUNCTION if "exit_code" in vars(cls)]
    codes = [cls.exit_code for cls in ending]
    assert len(set(codes)) == len(codes), {cls.__name__: cls.exit_code for cls in ending}
    assert all(64 <= code <= 78 for code in codes), "the range that no shell and no signal uses"


def test_every_error_answers_with_an_error_status() -> None:
    assert [cls.__name__ for cls in FUNCTION if not 400 <= cls.status <= 599] == []


def test_every_error_has_a_line_that_says_what_it_is() -> None:
    assert [cls.__name__ for cls in (*FUNCTION, *AGENT) if not (cls.__doc__ or "").strip().endswith(".")] == []


def test_codes_are_what_was_released() -> None:
    """A code, once released, is an interface: this file changes only by additions."""
    now = {
        "function": {cls.__name__: [cls.code, cls.exit_code, cls.status] for cls in FUNCTION},
        "agent": {cls.__name__: [cls.code, cls.retryable] for cls in AGENT},
    }
    assert now == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("cls", [cls for cls in AGENT if cls is not agent_errors.AgentError])
def test_an_agents_error_survives_the_wire(cls: type[agent_errors.AgentError]) -> None:
    back = agent_errors.from_wire(cls.code, "what happened")
    assert type(back) is cls
    assert back.text == "what happened"


def test_a_code_of_a_newer_agent_keeps_its_text() -> None:
    back = agent_errors.from_wire("from_the_future", "do this")
    assert type(back) is agent_errors.AgentError
    assert (back.text, back.retryable) == ("do this", False)


@pytest.mark.parametrize("cls", FUNCTION)
def test_the_body_of_an_error_has_openais_shape(cls: type[function_errors.FunctionError]) -> None:
    body = json.loads(error_json(cls("something happened; do this")))
    assert body.keys() == {"error"}
    assert body["error"]["message"] == "something happened; do this"
    assert body["error"]["code"] == cls.code
    assert body["error"]["type"] == ("invalid_request_error" if cls.status < 500 else "server_error")


def test_the_body_names_the_parameter_at_fault() -> None:
    assert (
        json.loads(error_json(function_errors.BadRequest("too large", "max_tokens")))["error"]["param"] == "max_tokens"
    )
