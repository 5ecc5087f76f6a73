"""A real browser for the page's tests: headless Chromium, driven by the W3C WebDriver protocol.

WebDriver is JSON over HTTP, so the standard library speaks it: https://www.w3.org/TR/webdriver2/.
"""

import base64
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from tests.needs import CHROMEDRIVER, CHROMIUM

ENTER, ESCAPE, TAB, SHIFT = "\ue007", "\ue00c", "\ue004", "\ue008"
HOME, LEFT, RIGHT = "\ue011", "\ue012", "\ue014"

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key by which the protocol marks an element
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
              "--disable-background-networking", "--hide-scrollbars", "--window-size=1000,800"]


class Browser:
    """One browser with one page. `close` ends it and its driver."""

    def __init__(self) -> None:
        assert CHROMIUM and CHROMEDRIVER, "there is no browser: apt-get install chromium chromium-driver"
        self._driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self._driver.stdout if "successfully on port" in line)
        self._url = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        options = {"binary": CHROMIUM, "args": _ARGUMENTS}
        session = self._call("POST", "", capabilities={"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}})
        self._url += f"/{session['sessionId']}"

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.kill()
            self._driver.wait()
            self._driver.stdout.close()

    def _call(self, method: str, path: str, **body: Any) -> Any:
        data = None if method in ("GET", "DELETE") else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    # ---- the page --------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self._call("POST", "/url", url=url)

    def reload(self) -> None:
        self._call("POST", "/refresh")

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a function body returns, its `arguments` included."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def emulate(self, *, width: int, height: int, scheme: str) -> None:
        """A screen of this size, that prefers this colour scheme: light or dark."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=False)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def devtools(self, command: str, **parameters: Any) -> Any:
        """What only Chromium's own protocol can do: media features, the size of a phone's screen."""
        return self._call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def complaints(self) -> list[str]:
        """What the console has said since it was last asked: errors, and what the page's policy forbade."""
        entries = self._call("POST", "/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self) -> bytes:
        """The viewport as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    # ---- what is on it ---------------------------------------------------------------------------------

    def texts(self, css: str) -> list[str]:
        """The text content of all elements that match, seen or not."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", css)

    def text(self, css: str) -> str:
        """That of the last one."""
        return self.texts(css)[-1]

    def is_seen(self, css: str) -> bool:
        return self.run("return document.querySelector(arguments[0])?.checkVisibility() ?? false", css)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
        """Wait until the condition holds; its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds} seconds; the page says "
                                     f"{self.run('return document.body.innerText')!r}")
            time.sleep(0.02)
        return value

    # ---- what a person does ----------------------------------------------------------------------------

    def _element(self, css: str) -> str:
        return self._call("POST", "/element", using="css selector", value=css)[_ELEMENT]

    def click(self, css: str) -> None:
        self._call("POST", f"/element/{self._element(css)}/click")

    def type(self, css: str, text: str) -> None:
        """Focus an element and type at its end."""
        self._call("POST", f"/element/{self._element(css)}/value", text=text)

    def press(self, *keys: str) -> None:
        """Press keys together, wherever the focus is: the first down first, and up last."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._call("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def hover(self, css: str) -> None:
        origin = {_ELEMENT: self._element(css)}
        move = {"type": "pointerMove", "origin": origin, "x": 0, "y": 0, "duration": 0}
        self._call("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])


class Page(Browser):
    """The chat page in a browser."""

    def ask(self, text: str) -> None:
        """Send a message, and wait until its reply has ended, however it did."""
        before = len(self.texts("article.reply"))
        self.type("#draft", text + ENTER)
        self.until(lambda: len(self.texts("article.reply:not(.writing)")) > before, "the end of a reply")

    def reply(self) -> str:
        """The last reply as it is shown, without control tokens."""
        return "".join(self.run("""
            const tokens = [...document.querySelectorAll(".reply .text")].at(-1).children;
            return [...tokens].filter((one) => !one.matches(".special")).map((one) => one.textContent)"""))

    def too_wide(self) -> list[str]:
        """What is seen and reaches beyond the right edge of the screen."""
        return self.run("""
            return [...document.querySelectorAll("body *")]
              .filter((one) => one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 1)
              .map((one) => one.outerHTML.slice(0, 80))""")
