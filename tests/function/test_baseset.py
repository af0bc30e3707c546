"""The locked base set: read, compared, digested, and never changed by a function's own requirements."""

from __future__ import annotations

import base64
import hashlib
import importlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.commands import baseset
from runtime.errors import BadConfig

PINS = {"base-one": "1.0", "base-two": "2.0"}


def _wheel(directory: Path, name: str, version: str, *needs: str) -> Path:
    """A wheel of one module, written by hand: nothing is built and nothing is fetched."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        f"{len(text.encode())}\n"
        for path, text in files.items()
    )
    path = directory / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name_, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            wheel.writestr(name_, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip can see."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_TARGET"):
        monkeypatch.delenv(variable, raising=False)
    return wheels


@pytest.fixture
def base(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of two distributions that are installed for the pip of this test only."""
    place = tmp_path / "base"
    place.mkdir()
    for name, version in PINS.items():
        with zipfile.ZipFile(_wheel(index, name, version)) as wheel:
            wheel.extractall(place)
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.syspath_prepend(str(place))
    importlib.invalidate_caches()
    return place


@pytest.fixture
def requirements(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "requirements.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_the_lock_that_is_shipped() -> None:
    pins = baseset.read_lock()
    assert {"torch", "transformers", "flask", "gunicorn", "msgspec"} <= pins.keys()
    assert "glowplug" not in pins
    assert all(name == baseset.normalised(name) and version for name, version in pins.items())


def test_what_is_installed_here_is_the_locked_base() -> None:
    assert baseset.differences(baseset.read_lock()) == []


def test_everything_that_the_base_needs_is_in_its_lock() -> None:
    needed = baseset.closure("glowplug[model]").keys()
    accelerated = {name for name in needed if name.startswith(("nvidia-", "cuda-", "triton"))}  # with torch's own build
    assert needed - accelerated <= baseset.read_lock().keys()


def test_a_lock_is_pins_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("# a comment\n\nTorch==2.9.0  # why\nruamel.yaml==1.0\nmsgpack_x==3\n")
    assert baseset.read_lock(path) == {"torch": "2.9.0", "ruamel-yaml": "1.0", "msgpack-x": "3"}


@pytest.mark.parametrize("line", ["torch", "torch>=2", "-r other.txt", "torch @ file:///x"])
def test_a_line_that_is_no_pin(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lock"
    path.write_text(f"flask==3\n{line}\n")
    with pytest.raises(BadConfig, match="is no pin; write name==version"):
        baseset.read_lock(path)


@pytest.mark.parametrize(("name", "normal"), [("A_b.C", "a-b-c"), ("a--b", "a-b"), (" torch ", "torch"), ("x", "x")])
def test_names_are_compared_as_pep_503_does(name: str, normal: str) -> None:
    assert baseset.normalised(name) == normal


def test_differences_are_a_sentence_each(base: Path) -> None:
    assert baseset.differences(PINS) == []
    assert baseset.differences({"base-one": "1.1", "base-two": "2.0", "gone": "3"}) == [
        "base-one is 1.0; the base has 1.1",
        "gone is not installed; the base has 3",
    ]


def test_a_build_of_the_same_version_is_no_difference(base: Path, index: Path) -> None:
    with zipfile.ZipFile(_wheel(index, "local-build", "1.0+cpu")) as wheel:
        wheel.extractall(base)
    assert baseset.differences({"local-build": "1.0"}) == []


def test_the_digest_changes_with_every_pin_and_with_nothing_else() -> None:
    digest = baseset.digest(PINS)
    assert len(digest) == 64
    assert baseset.digest(dict(reversed(PINS.items()))) == digest
    for other in (PINS | {"base-one": "1.0.1"}, PINS | {"three": "3"}, {"base-one": "1.0"}):
        assert baseset.digest(other) != digest


def test_the_digest_is_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = baseset.digest(PINS)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert baseset.digest(PINS) != digest


# --- closure ----------------------------------------------------------------------------------------------------------


def test_a_closure_follows_extras_and_leaves_out_what_is_not_installed(base: Path, index: Path) -> None:
    for path in (
        _wheel(index, "root", "1", "middle[fast]>=1", "absent; python_version < '3'", "side; extra == 'more'"),
        _wheel(index, "middle", "2", "leaf", "quick; extra == 'fast'", "slow; extra == 'slow'", "root"),
        _wheel(index, "leaf", "3+local"),
        _wheel(index, "quick", "4"),
        _wheel(index, "slow", "5"),
        _wheel(index, "side", "6"),
    ):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(base)
    assert baseset.closure("root") == {"middle": "2", "leaf": "3", "quick": "4"}
    assert baseset.closure("root[more]") == {"middle": "2", "leaf": "3", "quick": "4", "side": "6"}
    assert baseset.closure("nobody") == {}


# --- install ----------------------------------------------------------------------------------------------------------


def test_requirements_are_installed_beside_the_base(
    base: Path, index: Path, requirements: Callable[..., Path], tmp_path: Path
) -> None:
    _wheel(index, "mine", "1.5", "base-one", "more>=1")
    _wheel(index, "more", "1.1")
    target = tmp_path / "packages"
    assert sorted(baseset.install(requirements("mine"), target, PINS)) == ["mine==1.5", "more==1.1"]
    assert {path.name for path in target.glob("*.py")} == {"mine.py", "more.py"}, "the base is not copied"


def test_what_the_base_has_is_not_installed_again(
    base: Path, requirements: Callable[..., Path], tmp_path: Path
) -> None:
    target = tmp_path / "packages"
    assert baseset.install(requirements("base-one>=0.9", "# only this"), target, PINS) == []
    assert not target.exists()


@pytest.mark.parametrize("how", ["direct", "indirect"])
def test_another_version_of_a_base_distribution_is_refused(
    base: Path, index: Path, requirements: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    _wheel(index, "base-one", "1.1")
    _wheel(index, "mine", "1.0", "base-one>=1.1")
    wanted = "base-one>=1.1" if how == "direct" else "mine"
    target = tmp_path / "packages"
    with pytest.raises(BadConfig) as caught:
        baseset.install(requirements(wanted), target, PINS)
    assert "cannot be installed beside the base set" in caught.value.text
    assert "Ask for versions that go with base.lock, or drop the package" in caught.value.text
    assert "base-one" in caught.value.text, "pip's own words are in it"
    assert not target.exists()


def test_a_base_that_is_not_installed_is_not_brought_in_by_a_function(
    index: Path, requirements: Callable[..., Path], tmp_path: Path
) -> None:
    _wheel(index, "base-one", "1.0")
    _wheel(index, "mine", "1.0", "base-one")
    with pytest.raises(BadConfig, match=r"would change the base set \(base-one==1.0\); is the base installed\?"):
        baseset.install(requirements("mine"), tmp_path / "packages", PINS)


def test_a_package_that_does_not_exist(base: Path, requirements: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no-such-package"):
        baseset.install(requirements("no-such-package"), tmp_path / "packages", PINS)


def test_a_requirement_by_its_file_stays_that(
    base: Path, index: Path, requirements: Callable[..., Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    wheel = _wheel(elsewhere, "direct", "1.0")
    target = tmp_path / "packages"
    assert baseset.install(requirements(f"direct @ {wheel.as_uri()}"), target, PINS) == ["direct==1.0"]
    assert (target / "direct.py").exists()


def test_a_pin_for_other_pythons_does_not_count_here(tmp_path: Path) -> None:
    path = tmp_path / "base.lock"
    path.write_text('a==1 ; python_version < "3"\nb==2 ; python_version >= "3"\n')
    assert baseset.read_lock(path) == {"b": "2"}
