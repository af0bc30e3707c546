"""Layers that a process may be forked from: keys, the deepest that fits, and why there is no deeper one."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.layers.keys import LEVELS, Needs, deepest, key, relevant

NEEDS = Needs(
    machine="x86_64",
    python="cpython-3.11.7",
    base="b1",
    environment=(("HF_HOME", "/h"),),
    uid=1000,
    domain="team",
    preload=("llama",),
    model="m1",
    handler="h1",
)
OTHER: dict[str, Any] = {
    "machine": "aarch64", "python": "cpython-3.12.1", "base": "b2", "environment": (("HF_HOME", "/x"),), "uid": 0,
    "domain": "others", "preload": ("qwen2",), "model": "m2", "private": True, "handler": "h2",
}  # fmt: skip
BARE = ("machine", "python", "base", "environment", "uid", "domain")


def test_a_key_begins_with_those_of_the_layers_above() -> None:
    keys = [key(level, NEEDS) for level in LEVELS]
    for shallow, deep in itertools.pairwise(keys):
        assert deep.startswith(shallow + ".")


@pytest.mark.parametrize("field", [field.name for field in fields(Needs)])
def test_each_field_separates_from_the_level_on_that_it_belongs_to(field: str) -> None:
    changed = replace(NEEDS, **{field: OTHER[field]})
    first = "bare" if field in BARE else {"preload": "lang", "handler": "user"}.get(field, "model")
    for level in LEVELS:
        differs = key(level, changed) != key(level, NEEDS)
        assert differs == (LEVELS.index(level) >= LEVELS.index(first)), level


@given(st.sets(st.sampled_from(sorted(OTHER))), st.sets(st.sampled_from(["bare", "lang", "model"])))
def test_the_deepest_is_the_one_whose_key_begins_the_wanted_one(changed: set[str], levels: set[Any]) -> None:
    wanted = replace(NEEDS, **{name: OTHER[name] for name in changed})
    found = deepest(wanted, [(level, level, NEEDS) for level in levels])
    fits = [level for level in ("model", "lang", "bare") if level in levels]
    fits = [level for level in fits if key("user", wanted).startswith(key(level, NEEDS))]  # type: ignore[arg-type]
    assert found.layer == (fits[0] if fits else None)
    assert (found.why == "") == (found.layer == "model")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("environment", "another environment (HF_HOME)"),
        ("base", "another base set (b1, not b2)"),
        ("uid", "another user (1000, not none)"),
        ("domain", "another trust domain (team, not others)"),
        ("preload", "another list of models"),
        ("model", "another model (m1, not m2)"),
    ],
)
def test_the_reason_names_what_differs(field: str, words: str) -> None:
    wanted = replace(NEEDS, **{field: OTHER[field]})
    assert words in deepest(wanted, [("z", "model", NEEDS)]).why


def test_no_layer_at_all_is_said_so() -> None:
    found = deepest(NEEDS, [])
    assert found.layer is None
    assert found.why == "no model layer is there; no lang layer is there; no bare layer is there"


def test_only_what_imported_code_reads_is_compared_and_never_a_number_of_threads() -> None:
    environment = {"HF_HOME": "/h", "PYTHONPATH": "/p", "OMP_NUM_THREADS": "8", "GLOWPLUG_MODEL": "m", "HOSTNAME": "x"}
    assert relevant(environment) == (("HF_HOME", "/h"), ("PYTHONPATH", "/p"))
