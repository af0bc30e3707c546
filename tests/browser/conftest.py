"""A real headless Chromium, driven over the DevTools protocol on a pair of pipes; nothing but Chromium is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SECONDS = 180.0


class Chromium:
    """One browser process; commands go to its fd 3 and replies come from its fd 4, each ended by a NUL."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", "--no-first-run", "--disable-dev-shm-usage"]
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        with (profile.parent / "chromium.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", command, program, *options],
                pass_fds=(to_read, to_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str = "", **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            reply = self._next(deadline, method)
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self.events.append(reply)

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium did not answer {method} within {SECONDS:.0f} s"
            data = os.read(self._from, 1 << 20)
            assert data, f"Chromium ended while it was asked {method}"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def page(self, url: str, **options: Any) -> Page:
        return Page(self, url, **options)

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


class Page:
    """A tab of its own. `errors` are the console's errors, refused loads and breaches of the page's policy."""

    def __init__(
        self, browser: Chromium, url: str, *, width: int = 1440, height: int = 900, dark: bool = False, token: str = ""
    ) -> None:
        self._browser = browser
        context = browser.ask("Target.createBrowserContext")["browserContextId"]
        target = browser.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.ask(f"{domain}.enable")
        self.look(width, height, dark=dark)
        self.ask("Emulation.setTimezoneOverride", timezoneId="UTC")
        if token:
            source = f"sessionStorage.setItem('glowplug-token', {json.dumps(token)})"
            self.ask("Page.addScriptToEvaluateOnNewDocument", source=source)
        self.ask("Page.navigate", url=url)

    def ask(self, method: str, **parameters: Any) -> Any:
        return self._browser.ask(method, self._session, **parameters)

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Emulate a screen of this size and colour scheme, without motion."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme, still])
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def js(self, expression: str) -> Any:
        """Return the value of an expression; a promise is awaited."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, what: str) -> Any:
        deadline = time.monotonic() + SECONDS
        while not (found := self.js(expression)):
            assert time.monotonic() < deadline, f"not within {SECONDS:.0f} s: {what}; {self.text()!r}"
            time.sleep(0.02)
        return found

    def text(self) -> str:
        return str(self.js("document.body?.innerText"))

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self, path: Path | None = None) -> bytes:
        """Return a picture of the whole page, at its full length."""
        height = self.js("document.documentElement.scrollHeight")
        width = self.js("document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        data = base64.b64decode(found["data"])
        if path is not None:
            path.write_bytes(data)
        return data

    @property
    def events(self) -> list[dict[str, Any]]:
        self.js("0")  # what was on its way is here now
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    def errors(self) -> list[str]:
        found = []
        for event in self.events:
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                entry = event["params"]["entry"]
                found.append(f"{entry.get('url', '')} {entry['text']}")
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
        return found

    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no browser: install chromium, or set CHROMIUM to one")
    chromium = Chromium(program, tmp_path_factory.mktemp("chromium") / "profile")
    try:
        yield chromium
    finally:
        chromium.close()


@pytest.fixture
def opened(browser: Chromium) -> Callable[..., Page]:
    """Give `opened(url, width=1440, height=900, dark=False, token="")`: a page in a tab of its own."""
    return browser.page
