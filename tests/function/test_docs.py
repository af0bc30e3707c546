"""README and code say the same: every setting of the agent and every error has its row."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import cache_agent.errors
import runtime.errors
from cache_agent.config import AgentConfig

ROWS = re.findall(r"^\| `([A-Za-z0-9_]+)`.*$", (Path(__file__).parents[2] / "README.md").read_text(), re.MULTILINE)


def errors() -> list[type[Exception]]:
    return [
        found
        for module in (cache_agent.errors, runtime.errors)
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, (cache_agent.errors.AgentError, runtime.errors.FunctionError))
    ]


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_every_error_has_a_row(error: type[Exception]) -> None:
    assert error.code in ROWS


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(AgentConfig)])
def test_every_setting_of_the_agent_has_a_row(field: str) -> None:
    assert f"GLOWPLUG_{field.upper()}" in ROWS


def test_no_row_for_an_error_that_does_not_exist() -> None:
    codes = {error.code for error in errors()}
    assert {row for row in ROWS if row.islower()} <= codes
