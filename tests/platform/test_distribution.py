"""What a release consists of: the built distribution has all that it needs, and workflows are as GitHub takes them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_agent import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NO_CACHE = shutil.ignore_patterns("__pycache__", "*.pyc")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
KINDS = {"py", "c", "h", "lua", "js", "css", "html", "lock", "yaml", "typed"}


def files(package: str) -> Iterator[str]:
    """What a checkout has of it, its pages excepted."""
    for path in (ROOT / package).rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
            yield str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel, of a copy: building leaves things behind."""
    place, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    for name in ("runtime", "cache_agent"):
        shutil.copytree(ROOT / name, place / name, ignore=NO_CACHE)

    def build(what: str) -> Path:
        command = [sys.executable, "-c", BUILD, f"build_{what}", made]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return made / done.stdout.splitlines()[-1]

    return build("sdist"), build("wheel")


def test_a_distribution_has_all_files_of_both_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    expected = {*files("runtime"), *files("cache_agent")}
    assert {path.rpartition(".")[2] for path in expected} >= KINDS
    source, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected
    with tarfile.open(source) as archive:
        inside = {each.name.partition("/")[2] for each in archive if each.isfile()}
    assert {name for name in inside if name.startswith(("runtime/", "cache_agent/"))} == expected
    assert {"LICENSE", "README.md", "pyproject.toml"} <= inside


def test_an_installed_wheel_works_without_the_checkout(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Its dependencies are those of this environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python, bin_ = tmp_path / "venv/bin/python", tmp_path / "venv/bin"
    install = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", built[1]]
    subprocess.run(install, check=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import runtime, cache_agent; print(runtime.__file__, cache_agent.__file__)")
    assert all(path.startswith(str(site)) for path in where.split())
    assert run(bin_ / "glowplug", "--version") == f"glowplug, version {__version__}\n"
    assert run(bin_ / "glowplug-agent", "--version") == f"glowplug agent, version {__version__}\n"
    run(bin_ / "glowplug", "init", "chat")
    assert (tmp_path / "chat/handler.py").exists()


def test_the_versions_are_one() -> None:
    assert PROJECT["version"] == __version__


# --- workflows --------------------------------------------------------------------------------------------------------


def workflow(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((WORKFLOWS / name).read_text(), yaml.BaseLoader)
    return found


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def follows_the_schema(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *paths]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_workflows_follow_the_published_schema(tmp_path: Path) -> None:
    done = follows_the_schema(*WORKFLOWS.iterdir())
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "broken.yml"
    broken.write_text((WORKFLOWS / "tests.yml").read_text().replace("runs-on:", "run-on:"))
    assert follows_the_schema(broken).returncode == 1, "else the schema says nothing"


def test_every_action_has_a_version() -> None:
    for path in WORKFLOWS.iterdir():
        uses = re.findall(r"uses: (.*)", path.read_text())
        assert uses
        assert [each for each in uses if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", each)] == []


def test_the_tests_run_what_the_readme_says_on_every_python() -> None:
    jobs = workflow("tests.yml")["jobs"]
    assert commands(jobs["lint"]) == ["scripts/lint"]
    assert commands(jobs["test"])[-1] == "scripts/test"
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert pythons == ["3.11", "3.12", "3.13"]


def test_only_the_job_that_publishes_may_and_it_runs_nothing_of_ours() -> None:
    found = workflow("release.yml")
    assert found["on"] == {"push": {"tags": ["v*"]}}
    assert found["permissions"] == {"contents": "read"}
    build, publish = found["jobs"]["build"], found["jobs"]["publish"]
    assert "permissions" not in build
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert commands(publish) == []


@pytest.mark.parametrize(("tag", "fits"), [(f"v{__version__}", True), ("v9.9.9", False)])
def test_a_tag_that_is_not_the_version_publishes_nothing(
    tag: str, fits: bool, built: tuple[Path, Path], tmp_path: Path
) -> None:
    (check,) = [each for each in commands(workflow("release.yml")["jobs"]["build"]) if each.startswith("test -f")]
    (tmp_path / "dist").symlink_to(built[0].parent)
    done = subprocess.run(["bash", "-e", "-c", check], cwd=tmp_path, env={**os.environ, "GITHUB_REF_NAME": tag})
    assert (done.returncode == 0) == fits
