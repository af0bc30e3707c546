"""README and code say the same: settings, errors, exit codes, commands, messages: each has its row, and no other is."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
from documented import DOCUMENTS, ROOT

import cache_agent.errors
import runtime.errors
from cache_agent.config import AgentConfig
from cache_agent.wire import messages, protocol
from runtime import cli
from runtime.config import FunctionConfig

README = (ROOT / "README.md").read_text()
TEMPLATE = (ROOT / "templates" / "llm-python" / "README.md").read_text()
ROWS = re.findall(r"^\| `([A-Za-z0-9_]+)`.*$", README, re.MULTILINE)
SETTINGS = {
    f"GLOWPLUG_{field.name.upper()}" for kind in (AgentConfig, FunctionConfig) for field in dataclasses.fields(kind)
}
# Of the scripts, and of what a shell completes; each is explained where it is named.
OTHER_VARIABLES = {"GLOWPLUG_TEST_REDIS_URL", "GLOWPLUG_TEST_S3_URL", "GLOWPLUG_TORCH_INDEX", "GLOWPLUG_TEST_DATA"}
OTHER_VARIABLES |= {"GLOWPLUG_REPLAY_ROOT"}


def errors() -> list[type[Exception]]:
    return [
        found
        for module in (cache_agent.errors, runtime.errors)
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, (cache_agent.errors.AgentError, runtime.errors.FunctionError))
    ]


def cells(text: str, columns: int) -> list[list[str]]:
    """The rows of tables with so many columns, without backticks."""
    rows = [
        [re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return [row for row in rows if len(row) == columns]


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_every_error_has_a_row(error: type[Exception]) -> None:
    assert error.code in ROWS


@pytest.mark.parametrize("error", [e for e in errors() if issubclass(e, runtime.errors.FunctionError)])
def test_the_row_of_an_error_has_its_exit_code_and_status(error: type[runtime.errors.FunctionError]) -> None:
    rows = [row for row in cells(README, 5) if row[0] == error.code and row[1].startswith("function")]
    assert len(rows) == 1, rows
    _, _, exit_code, status, meaning = rows[0]
    own = error.__dict__
    assert exit_code == (str(error.exit_code) if "exit_code" in own else "")
    assert status == (str(error.status) if "status" in own else "")
    assert meaning == (error.__doc__ or "").replace("\n    ", " ")


def test_the_templates_tables_of_errors_agree() -> None:
    by_code = {e.code: e for e in errors() if issubclass(e, runtime.errors.FunctionError)}
    tables = [row for row in cells(TEMPLATE, 3) if row[0] in by_code or row[1] in by_code]
    assert len(tables) > 10
    for row in tables:
        if row[0] in by_code:
            assert row[1] == str(by_code[row[0]].status), row
        else:
            assert row[0] == str(by_code[row[1]].exit_code), row


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(AgentConfig)])
def test_every_setting_of_the_agent_has_a_row(field: str) -> None:
    assert f"GLOWPLUG_{field.upper()}" in ROWS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_document_names_a_setting_that_does_not_exist(document: str) -> None:
    named = set(re.findall(r"\bGLOWPLUG_[A-Z0-9_]*[A-Z0-9]\b(?!_)", (ROOT / document).read_text()))
    assert named <= SETTINGS | OTHER_VARIABLES


def test_no_row_for_an_error_that_does_not_exist() -> None:
    codes = {error.code for error in errors()}
    rows = {row[0] for row in cells(README, 5) if row[1].startswith(("agent", "function")) and row[0].islower()}
    assert rows == codes


def test_every_command_has_a_row_and_every_row_a_command() -> None:
    rows = [row[0] for row in cells(README, 2) if row[0].startswith("glowplug")]
    assert rows == [f"glowplug {name}" for name in cli.COMMANDS]


@pytest.mark.parametrize("message", messages.AnyMessage.__args__, ids=lambda message: message.__name__)
def test_every_message_is_in_the_protocols_diagram(message: type[messages.Message]) -> None:
    if ("asking", message) in protocol._TRANSITIONS:
        return  # "one reply each"
    tag = message.__struct_config__.tag
    assert re.search(rf"\b{tag}\b", protocol.__doc__ or ""), f"{tag} is not in the diagram of protocol.py"
