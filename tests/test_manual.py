"""Guides, pictures and the site that are made of the documents."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def script(path: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / path))


def test_what_commands_print_was_recorded_and_tells_nothing_of_a_computer() -> None:
    recorded = (DOCS / "command_outputs.json").read_text(encoding="utf-8")
    for name in (
        "generate",
        "chat",
        "tune",
        "serve",
        "node",
        "swarm",
        "plan",
        "models",
        "reputation",
        "doctor",
        "keygen",
    ):
        assert f'"{name}": [' in recorded, "run `make outputs`"
    assert "Traceback" not in recorded
    assert not re.search(r"/(tmp|root|work)/", recorded)


def test_the_picture_of_a_route_is_what_make_docs_writes() -> None:
    written = (DOCS / "route.svg").read_text(encoding="utf-8")
    assert written == script("docs/write_route_picture.py")["picture"](), "run `make docs`"
    assert "prefers-color-scheme: dark" in written
    assert not re.search(r"https?://(?!www\.w3\.org/)", written)


def test_the_site_has_every_document_and_links_that_hold_there(tmp_path: Path) -> None:
    builder = script("scripts/build_site.py")
    builder["assemble"](tmp_path / "pages")
    pages = {path.name for path in (tmp_path / "pages").iterdir()}
    named = set(
        re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    documents = {name for name in pages if name.endswith(".md")}
    assert named <= documents
    for name in documents:
        text = (tmp_path / "pages" / name).read_text(encoding="utf-8")
        links = re.findall(r'(?:\]\(|(?:src|srcset)=")([^)"#:\s]+)[)"#]', text)
        assert {link for link in links if not (tmp_path / "pages" / link).exists()} <= {"LICENSE"}, name


@pytest.mark.parametrize(
    ("html", "is_fetched"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ("<link rel=stylesheet href=//fonts.example/css>", True),
        ('<img alt="" src="http://other.example/a.png">', True),
        ("<style>a{background:url(https://other.example/b.png)}</style>", True),
        ('<a href="https://other.example/">elsewhere</a>', False),
        ('<link rel="canonical" href="https://p2pinfer.example/">', False),
        ('<script src="assets/x.js"></script>', False),
    ],
)
def test_what_a_browser_would_fetch_elsewhere_is_found(html: str, is_fetched: bool, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html)
    assert bool(list(script("scripts/build_site.py")["fetched_elsewhere"](tmp_path))) == is_fetched
