"""The container's command: opens the function's port, then becomes of-watchdog, which starts the shim on that port.

The watchdog takes requests from its first millisecond, and while nobody listens behind it answers them with 500, or an
event stream's with an empty 200. With the port open before, they wait. Nothing is imported that would delay it.
"""

import _socket
import os
import sys

address = os.environ.get("GLOWPLUG_HOST", "127.0.0.1"), int(os.environ.get("PORT", "5000"))
listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
listener.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)  # connections inherit it; else an answer waits 40 ms
try:
    listener.bind(address)
except OSError as error:
    print(
        f"glowplug: cannot listen on {address[0]}:{address[1]}: {error.strerror}; set PORT to another port, and "
        "upstream_url with it [bad_config]",
        file=sys.stderr,
    )
    sys.exit(64)
listener.listen(1024)
os.set_inheritable(listener.fileno(), True)
os.environ["GLOWPLUG_LISTEN_FD"] = str(listener.fileno())
os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606  no shell is wanted
