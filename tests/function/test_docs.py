"""Pages and code say the same: settings, errors, commands, messages, links: each has its row, and no other is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
from documented import DOCUMENTS, FOLDERS, PAGES, ROOT, plain, rows, text

import cache_agent.errors
import runtime.errors
from cache_agent.config import AgentConfig
from cache_agent.wire import messages, protocol
from runtime import cli
from runtime.config import FunctionConfig

TEMPLATE = (ROOT / "templates" / "llm-python" / "README.md").read_text()
CONFIGS = {"cache_agent/": AgentConfig, "runtime/": FunctionConfig}
SETTINGS = {f"GLOWPLUG_{field.name.upper()}" for kind in CONFIGS.values() for field in dataclasses.fields(kind)}
# Of the scripts, and of what a shell completes; each is explained where it is named.
OTHER_VARIABLES = {"GLOWPLUG_TEST_REDIS_URL", "GLOWPLUG_TEST_S3_URL", "GLOWPLUG_TORCH_INDEX", "GLOWPLUG_TEST_DATA"}
OTHER_VARIABLES |= {"GLOWPLUG_REPLAY_ROOT"}
MANY = 5  # modules that a folder may have without a page
SHORT = {"README.md": 250}  # lines; of the others those of a package have at most two pages
TWO_PAGES = 120


def errors(root: type[Exception]) -> list[type[Exception]]:
    module = inspect.getmodule(root)
    return [found for _, found in inspect.getmembers(module, inspect.isclass) if issubclass(found, root)]


FUNCTION_ERRORS = errors(runtime.errors.FunctionError)
AGENT_ERRORS = errors(cache_agent.errors.AgentError)


def sentence(error: type[Exception]) -> str:
    return (error.__doc__ or "").replace("\n    ", " ")


@pytest.mark.parametrize("package", CONFIGS)
def test_every_setting_has_one_row_beside_the_code_that_owns_it(package: str) -> None:
    names = [name for row in rows(text(package), "variable") for name in re.findall(r"`(GLOWPLUG_[A-Z0-9_]+)`", row[0])]
    assert Counter(names) == Counter(f"GLOWPLUG_{field.name.upper()}" for field in dataclasses.fields(CONFIGS[package]))


@pytest.mark.parametrize("package", CONFIGS)
def test_the_first_page_of_a_package_says_where_each_setting_is(package: str) -> None:
    """An operator looks for a name in one list; the row that explains it may be anywhere below."""
    page = ROOT / package / "README.md"
    listed = {}
    for row in rows(page.read_text(), "settings of"):
        target = re.search(r"\]\(([^)#]*)", row[0])
        assert target, row
        listed[page.parent / target[1]] = set(re.findall(r"`(GLOWPLUG_[A-Z0-9_]+)`", row[1]))
    for owner, names in listed.items():
        own = rows(owner.read_text(), "variable")
        assert names == {name for row in own for name in re.findall(r"`(GLOWPLUG_[A-Z0-9_]+)`", row[0])}, owner
    everywhere = {name for names in listed.values() for name in names}
    assert everywhere == {f"GLOWPLUG_{field.name.upper()}" for field in dataclasses.fields(CONFIGS[package])}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_document_names_a_setting_that_does_not_exist(document: str) -> None:
    named = set(re.findall(r"\bGLOWPLUG_[A-Z0-9_]*[A-Z0-9]\b(?!_)", (ROOT / document).read_text()))
    assert named <= SETTINGS | OTHER_VARIABLES


def test_every_error_of_a_function_has_its_row() -> None:
    found = [[plain(cell) for cell in row] for row in rows((ROOT / "runtime" / "README.md").read_text(), "code")]
    assert sorted(found) == sorted(
        [
            error.code,
            str(error.exit_code) if "exit_code" in vars(error) else "",
            str(error.status) if "status" in vars(error) else "",
            sentence(error),
        ]
        for error in FUNCTION_ERRORS
    )


def test_every_error_of_the_agent_has_its_row() -> None:
    found = [[plain(cell) for cell in row] for row in rows((ROOT / "cache_agent" / "README.md").read_text(), "code")]
    assert sorted(found) == sorted(
        [error.code, "yes" if error.retryable else "", sentence(error)]
        for error in AGENT_ERRORS
        if error is not cache_agent.errors.AgentError  # whose code one of the others shares
    )


def test_the_templates_tables_of_errors_agree() -> None:
    by_code = {error.code: error for error in FUNCTION_ERRORS}
    statuses, exits = rows(TEMPLATE, "code"), rows(TEMPLATE, "exit code")
    assert len(statuses) + len(exits) > 10
    for row in statuses:
        assert row[1] == str(by_code[plain(row[0])].status), row
    for row in exits:
        assert row[0] == str(by_code[plain(row[1])].exit_code), row


def test_every_command_has_a_row_and_every_row_a_command() -> None:
    found = [plain(row[0]) for row in rows((ROOT / "runtime" / "commands" / "README.md").read_text(), "command")]
    assert found == [f"glowplug {name}" for name in cli.COMMANDS]


@pytest.mark.parametrize("message", messages.AnyMessage.__args__, ids=lambda message: message.__name__)
def test_every_message_is_in_the_protocols_diagram(message: type[messages.Message]) -> None:
    if ("asking", message) in protocol._TRANSITIONS:
        return  # "one reply each"
    tag = message.__struct_config__.tag
    assert re.search(rf"\b{tag}\b", protocol.__doc__ or ""), f"{tag} is not in the diagram of protocol.py"


# --- the pages themselves ---------------------------------------------------------------------------------------------


def prose(page: str) -> str:
    """Without blocks of code, in which brackets mean something else."""
    return re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What headings are linked by, as forges make it of them."""
    outside = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "`code`", prose(page)))
    return [target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_the_pages_have_links() -> None:
    assert sum(len(links(page)) for page in PAGES) > 50
    assert any("#" in link for page in PAGES for link in links(page))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_page_names_exists(document: str) -> None:
    """`name.py` anywhere in the tree; with folders before it, at the end of some path."""
    files = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    for named in set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|c|h|lua|lock))`", prose(document))) - USERS:
        beside = (ROOT / document).parent / named
        assert beside.exists() or any(file.endswith(f"/{named}") for file in files), named


# Files of a function's developer.
USERS = {"handler.py", "handler_test.py", "chat/handler.py", "chat/handler_test.py"}


@pytest.mark.parametrize("document", [page for page in DOCUMENTS if "```python" in (ROOT / page).read_text()])
def test_what_an_example_imports_of_ours_is_there(document: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and f"{node.module}".partition(".")[0] in ("runtime", "cache_agent"):
                module = importlib.import_module(f"{node.module}")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_folder_of_many_modules_has_a_page() -> None:
    for package in CONFIGS:
        for folder in (ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())):
            if len(list(folder.glob("*.py"))) > MANY:
                assert (folder / "README.md").exists(), folder


@pytest.mark.parametrize("page", [page for page in PAGES if page in SHORT or page.startswith(tuple(CONFIGS))])
def test_a_page_stays_short(page: str) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= SHORT.get(page, TWO_PAGES)
