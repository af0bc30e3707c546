"""`python -m runtime` is `glowplug`."""

from runtime.cli import main

if __name__ == "__main__":
    main(prog_name="glowplug")
