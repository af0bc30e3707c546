"""The entrypoint of a function's container: `python -P -m runtime.shim`."""

from __future__ import annotations

import sys

from runtime.container.shim import main

if __name__ == "__main__":
    sys.exit(main())
