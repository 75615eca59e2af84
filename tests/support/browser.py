"""A page in headless Chromium: its text, and a screenshot that stays in $BPT_SCREENSHOTS where that is set, to be looked at."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PATIENCE = 180


def seen(link: str, folder: Path, name: str, until: str, size: str = "1700,2000") -> str:
    """Open a link, wait until the script `until` is true, keep a screenshot, and return the text of the page."""
    kept = Path(os.environ.get("BPT_SCREENSHOTS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={size}"]
    options += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", "about:blank"]
    # A killed browser leaves its socket behind, whose path must be short.
    own = tempfile.mkdtemp(prefix="browser")
    browser = subprocess.Popen(
        [str(BROWSER), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": own}
    )
    try:
        assert browser.stderr is not None
        port = next(found[1] for line in browser.stderr if (found := re.search(r"DevTools listening on ws://[^:]+:(\d+)/", line)))
        text, picture = asyncio.run(_visit(int(port), link, until))
    finally:
        browser.kill()
        browser.communicate()
        shutil.rmtree(own, ignore_errors=True)
    (kept / f"{name}.png").write_bytes(picture)
    return text


async def _visit(port: int, link: str, until: str) -> tuple[str, bytes]:
    async with aiohttp.ClientSession() as client:
        async with client.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(one for one in await answer.json() if one["type"] == "page")
        async with client.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
            numbers = itertools.count()

            async def call(method: str, **parameters: object) -> dict:
                number = next(numbers)
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while (message := await socket.receive_json()).get("id") != number:
                    pass
                return message["result"]

            async def value(script: str) -> object:
                return (await call("Runtime.evaluate", expression=script))["result"].get("value")

            await call("Page.navigate", url=link)
            deadline = time.monotonic() + PATIENCE
            while not await value(until):
                text = await value("document.body ? document.body.innerText : ''")
                assert time.monotonic() < deadline, f"{until} is not true of the page: {text}"
                await asyncio.sleep(0.5)
            await asyncio.sleep(2)  # for what is drawn after that
            picture = await call("Page.captureScreenshot", format="png")
            return str(await value("document.body.innerText")), base64.b64decode(picture["data"])
