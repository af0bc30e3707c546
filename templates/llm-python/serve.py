"""What of-watchdog starts: the runtime's shim, on the port that listen.py has opened, or on one of its own."""

import os
import socket
import sys

from runtime import shim


class ShimOnOpenPort(shim.Shim):
    """Takes the listening socket that came through the watchdog, which goes on holding it."""

    def _open_port(self):
        listener = socket.socket(fileno=int(os.environ["GLOWPLUG_LISTEN_FD"]))
        listener.set_inheritable(False)
        return listener

    def run(self):
        try:
            return super().run()
        finally:
            # Closing alone would leave the watchdog's copy open, and late requests waiting on it for ever.
            self._listener.shutdown(socket.SHUT_RDWR)


if "GLOWPLUG_LISTEN_FD" in os.environ:
    shim.Shim = ShimOnOpenPort
sys.exit(shim.main())
