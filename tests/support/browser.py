"""Chromium, by its own protocol: a page at a true width, light or dark, and what it measures.

python -m tests.support.browser PAGE WIDTH light|dark FILE.png [HEIGHT]      a picture of the page
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
WHY_NOT = "" if BROWSER and find_spec("aiohttp") else "needs Chromium: apt-get install chromium"

Call = Callable[..., Awaitable[dict[str, Any]]]

_MEASURES = """
(() => {
  const texts = [...document.querySelectorAll('body *')].filter(
    e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
  const outside = texts.filter(e => { const r = e.getBoundingClientRect(); return r.left < 0 || r.right > innerWidth + 1 });
  const cards = getComputedStyle(document.querySelector('.cards')).gridTemplateColumns.split(' ').length;
  return JSON.stringify({
    width: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    smallest_text_px: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
    background: getComputedStyle(document.documentElement).backgroundColor, card_columns: cards,
    texts_outside: outside.map(e => e.textContent.slice(0, 40)),
  });
})()
"""


def looked_at(page: Path, *, width: int, scheme: str) -> dict[str, Any]:
    """What the page measures at this width: see the names in `_MEASURES`."""

    async def measure(call: Call) -> dict[str, Any]:
        result = await call("Runtime.evaluate", expression=_MEASURES, returnByValue=True)
        measured: dict[str, Any] = json.loads(result["result"]["value"])
        return measured

    return asyncio.run(_with_page(page, width, scheme, measure))


def picture(page: Path, *, width: int, scheme: str, height: int | None = None) -> bytes:
    """The page as a PNG file, its first `height` pixels or all of it."""

    async def shoot(call: Call) -> dict[str, Any]:
        result = await call("Runtime.evaluate", expression=_MEASURES, returnByValue=True)
        whole = json.loads(result["result"]["value"])["height"]
        clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole), "scale": 1}
        return await call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)

    return base64.b64decode(asyncio.run(_with_page(page, width, scheme, shoot))["data"])


async def _with_page(
    page: Path, width: int, scheme: str, use: Callable[[Call], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    import aiohttp

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += [
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            address = await asyncio.to_thread(_page_address, Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                number = 0

                async def call(method: str, **parameters: Any) -> dict[str, Any]:
                    nonlocal number
                    number += 1
                    await socket.send_json({"id": number, "method": method, "params": parameters})
                    while (answer := await socket.receive_json()).get("id") != number:
                        pass
                    result: dict[str, Any] = answer["result"]
                    return result

                await call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=844,
                    deviceScaleFactor=1,
                    mobile=width < 500,
                )
                feature = {"name": "prefers-color-scheme", "value": scheme}
                await call("Emulation.setEmulatedMedia", features=[feature])
                await call("Page.navigate", url=page.absolute().as_uri())
                state = {"expression": "document.readyState == 'complete' && location.protocol == 'file:'"}
                while not (await call("Runtime.evaluate", **state))["result"].get("value"):
                    await asyncio.sleep(0.02)
                return await use(call)
        finally:
            process.terminate()
            process.wait()


def _page_address(port_file: Path, timeout_s: float = 30) -> str:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if port_file.exists() and (lines := port_file.read_text().splitlines()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json") as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise TimeoutError("Chromium has not started")


if __name__ == "__main__":
    path, at_width, at_scheme, out, *most = sys.argv[1:]
    at_height = int(most[0]) if most else None
    Path(out).write_bytes(picture(Path(path), width=int(at_width), scheme=at_scheme, height=at_height))
