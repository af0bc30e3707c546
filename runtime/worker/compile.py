"""Imports all modules of a start once, when an image is built, so that bytecode and caches are on disk: `python -m`."""

from __future__ import annotations

from runtime.worker.imports import imported


def main() -> None:
    def load() -> None:
        from runtime.engine import choice, serial  # noqa: F401
        from runtime.worker import weights, worker  # noqa: F401

    imported(load)


if __name__ == "__main__":
    main()
