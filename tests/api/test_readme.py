"""The README's line for curl, sent as curl sends it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import trio

from .conftest import OpenDoor

README = Path(__file__).parents[2] / "README.md"


async def test_the_line_works_as_it_is_written(open_door: OpenDoor) -> None:
    found = re.findall(r"^curl .*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    (line,) = (each for each in found if "127.0.0.1:8000" in each)
    _, address, option, body = shlex.split(line)
    assert option == "-d"
    async with open_door() as door:

        def send() -> Any:
            url = address.replace("http://127.0.0.1:8000", door.url)
            kind = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "*/*"}  # curl's own
            with urlopen(Request(url, body.encode(), kind)) as answer:
                return json.load(answer)

        told = await trio.to_thread.run_sync(send)
    assert told["choices"][0]["message"]["content"].startswith(", there was a little girl named Lily.")
