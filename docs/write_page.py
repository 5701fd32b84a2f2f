"""Pictures of the page that `p2pinfer serve` shows, for the README: `make page` writes them.

Needs playwright, and Chromium as a program of the system. `python docs/write_page.py FOLDER` writes there.
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

ASKED = "Once upon a time there was a little robot"
# By name: width and height of the window, colours, and what of the page is photographed.
PICTURES: dict[str, tuple[int, int, str, bool]] = {
    "page": (1180, 740, "light", False),
    "page-dark": (1180, 740, "dark", False),
    "page-phone": (390, 844, "light", True),
}


def main() -> None:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
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
                for name, (width, height, colours, is_whole) in PICTURES.items():
                    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
                    take(page, url, folder / f"{name}.png", is_whole=is_whole)
                    page.close()
                browser.close()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def take(page: Any, url: str, picture: Path, *, is_whole: bool) -> None:
    """Ask for a text, and photograph the page with its route."""
    page.goto(url)
    page.locator("#peers li").nth(2).wait_for()
    page.get_by_label("Message").fill(ASKED)
    page.keyboard.press("Enter")
    page.locator(".origin").wait_for(timeout=60_000)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=picture, full_page=is_whole)


if __name__ == "__main__":
    main()
