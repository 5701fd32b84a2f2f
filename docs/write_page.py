"""Pictures of the page that `p2pinfer serve` shows, for the README: `make page` writes them.

Needs playwright, and Chromium as a program of the system.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).with_name("page.png")
ASKED = "Once upon a time there was a little robot"


def main() -> None:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    serve = [sys.executable, "-m", "p2pinfer", "serve", "--port", "0", "--json"]
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen([*serve, "--data-dir", home], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["urls"][0]
            with sync_playwright() as playwright:
                browser: Any = playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                page = browser.new_page(viewport={"width": 1180, "height": 740})
                page.goto(url)
                page.locator("#peers li").nth(2).wait_for()
                page.get_by_label("Message").fill(ASKED)
                page.keyboard.press("Enter")
                page.locator(".origin").wait_for(timeout=60_000)
                page.screenshot(path=PICTURE)
                browser.close()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


if __name__ == "__main__":
    main()
