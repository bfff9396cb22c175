"""A page that is used: headless Chromium over its debugging pipe, with nothing but the standard
library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser import HEADLESS, NAMES

_FLAGS = (
    *HEADLESS,
    "--remote-debugging-pipe",
    "about:blank",
)
_LAUNCH = (
    # Chromium reads from 3 and writes to 4; both may be taken by other ends at first.
    "import fcntl, os, sys; a, b = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]);"
    "os.dup2(a, 3); os.dup2(b, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Page:
    """One tab. `messages` has what the console and the browser's log said of it, `requests` the
    addresses that its pages asked for, their own and data: left out."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = os.fdopen(to, "wb", 0), os.fdopen(back, "rb")
        self._n, self._session = 0, ""
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.send(f"{domain}.enable")
        # A picture beyond the window has none, and would be laid out anew without.
        self.send("Emulation.setScrollbarsHidden", hidden=True)

    def send(self, method: str, **params: Any) -> Any:
        """A command's result, as Chromium's protocol has it. RuntimeError where it has none."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (said := self._heard()).get("id") != self._n:
            self._note(said)
        if "error" in said:
            raise RuntimeError(f"{method}: {said['error']}")
        return said["result"]

    def _heard(self) -> dict[str, Any]:
        text = bytearray()
        while (one := self._back.read(1)) not in (b"\0", b""):
            text += one
        assert text, "Chromium has ended"
        said: dict[str, Any] = json.loads(text)
        return said

    def _note(self, said: dict[str, Any]) -> None:
        params = said.get("params", {})
        if said.get("method") == "Runtime.consoleAPICalled":
            values = [str(a.get("value", a.get("description"))) for a in params["args"]]
            self.messages.append(" ".join([params["type"], *values]))
        elif said.get("method") == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(params["exceptionDetails"]))
        elif said.get("method") == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif said.get("method") == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if params.get("type") != "Document" and not address.startswith("data:"):
                self.requests.append(address)

    def size(self, width: int, height: int = 900) -> None:
        """As on a screen of this many points."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression, a promise's as well."""
        done = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until an expression holds. AssertionError where it never does."""
        end = time.monotonic() + seconds
        look = (
            "new Promise((done) => { let left = 10; const look = () => {"
            f" if (document.body && ({condition})) done(true);"
            " else if (!left--) done(false); else setTimeout(look, 30); }; look(); })"
        )
        # Asked again and again: a page that comes in place of another takes its promises with it.
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):
                if self.run(look):
                    return
        raise AssertionError(f"never: {condition}; {self.messages}")

    def type(self, selector: str, text: str) -> None:
        """Text by the keyboard, in place of what an input had."""
        self.run(f"(e => {{ e.focus(); e.select(); }})(document.querySelector('{selector}'))")
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """By the pointer, at the middle of the first element."""
        self.move(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._pointer(kind, button="left", clickCount=1)

    def move(self, selector: str) -> None:
        """The pointer to the middle of the first element."""
        self._at = self._middle(selector)
        self._pointer("mouseMoved")

    def _middle(self, selector: str) -> dict[str, float]:
        """Where the first element, if it goes on in a second line its first, is in the window."""
        found: dict[str, float] = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getClientRects()[0];"
            "return {x: b.x + b.width / 2, y: b.y + b.height / 2}; })"
            f"(document.querySelector('{selector}'))"
        )
        return found

    def _pointer(self, kind: str, **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, **self._at, **more)

    def touch(self, on: bool = True) -> None:
        """As on a screen that is touched: no pointer hovers."""
        self.send("Emulation.setTouchEmulationEnabled", enabled=on)
        features = [{"name": "hover", "value": "none"}, {"name": "pointer", "value": "coarse"}]
        self.send("Emulation.setEmulatedMedia", features=features if on else [])

    def tap(self, selector: str) -> None:
        """A finger on the middle of the first element, and off."""
        self._finger(selector, 0)

    def swipe(self, selector: str, up: int) -> None:
        """A finger from the middle of the first element `up` points to the top, and off; until
        nothing moves any more, for a finger on what still rolls stops it and does no more."""
        self._finger(selector, up)
        self.run(
            "new Promise((done) => { let still = 0, was = scrollY; const look = () => {"
            " still = scrollY === was ? still + 1 : 0; was = scrollY;"
            " if (still > 20) done(); else requestAnimationFrame(look); }; look(); })"
        )

    def _finger(self, selector: str, up: int) -> None:
        x, y = self._middle(selector).values()
        steps = range(10, up + 10, 10) if up else ()
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        for step in steps:
            points = [{"x": x, "y": y - step}]
            self.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=points)
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def beyond(self) -> list[str]:
        """What reaches beyond the sides of the screen, but for what is scrolled within them."""
        return self.run(
            "[...document.querySelectorAll('body *')].filter((e) => {"
            " const { left, right, width } = e.getBoundingClientRect();"
            " if (!width || right <= 0 || (left >= 0 && right <= innerWidth + 1)) return false;"
            " for (let up = e.parentElement; up; up = up.parentElement)"
            "  if (getComputedStyle(up).overflowX !== 'visible') return false;"
            " return true; }).map((e) => `${e.tagName} ${e.id} ${e.getAttribute('class')}`)"
        )

    def key(self, name: str, code: int) -> None:
        """A key that the focused element gets."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code)

    def part(self, selector: str, path: Path) -> None:
        """A PNG of the first element."""
        clip = self.run(
            "(b => ({x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height, "
            f"scale: 1}}))(document.querySelector('{selector}').getBoundingClientRect())"
        )
        shot = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def picture(self, path: Path, height: int | None = None) -> None:
        """A PNG of the page from its top, all of it unless `height` says."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "scale": 1}
        clip["height"] = min(size["height"], height or 6000)
        shot = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chrome() -> Iterator[Page | None]:
    """A browser with one tab; None, with a warning, where there is no Chromium."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        warnings.warn("no Chromium on PATH: the page was not used", stacklevel=3)
        yield None
        return
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        launch = [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), binary]
        process = subprocess.Popen(
            [*launch, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        page = Page(ours_out, ours_in)
        try:
            yield page
        finally:
            with contextlib.suppress(Exception):
                page._session = ""
                page.send("Browser.close")
            process.wait(timeout=30)
