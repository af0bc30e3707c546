"""Real programs that tests run where a variable names them."""

from __future__ import annotations

import os

import pytest


def program(variable: str) -> str:
    """The program that a variable names; skips without it."""
    path = os.environ.get(variable, "")
    if not path:
        pytest.skip(f"{variable} does not name a program")
    if not os.access(path, os.X_OK):
        pytest.fail(f"{variable}={path} is no program")
    return os.path.abspath(path)
