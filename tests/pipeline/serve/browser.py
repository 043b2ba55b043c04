"""A real browser without a window, by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

# Nothing of its own on the network, and no GPU.
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps"),
    *("--disable-extensions", "--disable-sync", "--remote-debugging-port=0"),
)
PATIENCE = 20.0  # seconds


def find_browser() -> str:
    """Its path; without one the test is skipped, except in CI, which installs one."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI_REQUIRES_BROWSER") == "1":
            pytest.fail("there is no chromium")
        pytest.skip("there is no chromium")
    return found


class Tab:
    """A tab of it.

    Attributes:
        asked: every URL that was asked for.
        said: what the page wrote to its console, and what the browser has to say about it.
    """

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._listening = asyncio.create_task(self._listen())
        self.asked: list[str] = []
        self.said: list[str] = []

    async def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=url)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        request: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            request["sessionId"] = self._session
        await self._socket.send_json(request)
        return await asyncio.wait_for(self._answers[number], PATIENCE)

    async def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to in the page."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def count(self, selector: str) -> int:
        """How many elements of the page there are like this."""
        return int(await self.value(f"document.querySelectorAll({json.dumps(selector)}).length"))

    async def text(self, selector: str) -> str:
        """What the first of them shows."""
        return str(await self.value(f"document.querySelector({json.dumps(selector)})?.innerText"))

    async def until(self, expression: str) -> None:
        """Return as soon as something is true in the page."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while not await self.value(f"Boolean({expression})"):
            text = await self.value("document.body.innerText")
            assert asyncio.get_running_loop().time() < deadline, f"{expression} does not come true: {text}"
            await asyncio.sleep(0.05)

    async def until_text(self, selector: str, text: str) -> None:
        """Return as soon as the first element like this shows this text, and perhaps more."""
        await self.until(
            f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})"
        )

    async def until_count(self, selector: str, count: int) -> None:
        """Return as soon as there are as many."""
        await self.until(f"document.querySelectorAll({json.dumps(selector)}).length === {count}")

    async def click(self, text: str) -> None:
        """Click on what has this text, as soon as it is there."""
        found = (
            "[...document.querySelectorAll('a, button, summary')]"
            f".find(each => each.innerText.trim() === {json.dumps(text)})"
        )
        await self.until(found)
        await self.value(f"{found}.click()")

    async def enter(self, selector: str, value: str) -> None:
        """Give a field of a form a value."""
        await self.value(
            f"(field => {{ field.value = {json.dumps(value)}; for (const name of ['input', 'change']) "
            f"field.dispatchEvent(new Event(name)); }})(document.querySelector({json.dumps(selector)}))"
        )

    async def press(self, key: str, text: str = "") -> None:
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39}.get(key, ord(key[0]))
        down = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    async def point(self, selector: str, number: int, *, tap: bool = False) -> None:
        """Move the pointer to the middle of one of the elements like this, or tap there."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        await self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = await self.value(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())"
        )
        if tap:
            await self.call("Emulation.setTouchEmulationEnabled", enabled=True)
            await self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            await self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def picture(self, path: Path) -> None:
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def _listen(self) -> None:
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                continue
            told = message.json()
            parameters = told.get("params", {})
            match told.get("method"):
                case None:
                    answer = self._answers.pop(told["id"])
                    if "error" in told:
                        answer.set_exception(RuntimeError(told["error"]["message"]))
                    else:
                        answer.set_result(told["result"])
                case "Network.requestWillBeSent":
                    self.asked.append(parameters["request"]["url"])
                case "Runtime.consoleAPICalled":
                    self.said.append(str(parameters["args"]))
                case "Runtime.exceptionThrown":
                    self.said.append(str(parameters["exceptionDetails"]))
                case "Log.entryAdded":
                    self.said.append(parameters["entry"]["text"])
                case "Page.javascriptDialogOpening":
                    self.said.append(f"dialog: {parameters['message']}")

    async def close(self) -> None:
        with suppress(RuntimeError, TimeoutError, ConnectionError):
            self._session = None
            await self.call("Browser.close")
        self._listening.cancel()


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """One tab of a browser that ends with the block.

    Args:
        folder: for its own files.
    """
    process = await asyncio.create_subprocess_exec(
        find_browser(),
        *OPTIONS,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        where = folder / "DevToolsActivePort"
        async with asyncio.timeout(PATIENCE):
            while not (where.is_file() and len(lines := where.read_text().split()) == 2):
                await asyncio.sleep(0.05)
        async with (
            ClientSession() as session,
            session.ws_connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_msg_size=0) as socket,
        ):
            tab = Tab(socket)
            try:
                yield tab
            finally:
                await tab.close()
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
