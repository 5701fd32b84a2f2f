"""Writes the outputs of `p2pinfer plan` in the guides: `make docs`.

A fence of `console` that begins with `$ p2pinfer plan` is written anew with what that command prints. The
models in them are known by their published sizes, so no hub is asked.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Generator
from pathlib import Path
from unittest import mock

import huggingface_hub.constants

from p2pinfer.cli.app import run

GUIDES = tuple(Path(__file__).with_name(name) for name in ("friends.md", "hardware.md"))
WIDTH = 84  # what a page of the site shows without scrolling
_FENCE = re.compile(r"(?<=^```console\n)\$ p2pinfer (plan [^\n]*)\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)


def with_plans(text: str) -> str:
    """`text` of a guide, with what its plans print today."""
    return _FENCE.sub(lambda found: f"$ p2pinfer {found[1]}\n{_printed(found[1])}", text)


def _printed(command: str) -> str:
    with _offline(), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(shlex.split(command)) == 0, command
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"


@contextlib.contextmanager
def _offline() -> Generator[None]:
    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", new=True),
        mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH)}),
    ):
        yield


def main() -> None:
    for guide in GUIDES:
        guide.write_text(with_plans(guide.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
