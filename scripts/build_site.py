"""Builds the documentation as a site that works without a network: `make site`.

    python scripts/build_site.py [assemble]

Documents lie where people on a code host look for them: README.md in the root, the others in docs/. Here they
become one folder with one set of links, build/pages, of which mkdocs makes build/site. The result is searched
for anything that a browser would fetch from another host.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = ROOT / "build" / "pages"
SITE: Final = ROOT / "build" / "site"
# Documents outside docs/, and what they are called in the site.
OUTSIDE: Final = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "vendor/README.md": "vendor.md",
}
_LINK: Final = re.compile(r'(\]\(|(?:src|srcset|href)=")([^)"#:\s]+)')
_FETCHED: Final = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed|object)\b[^>]*?(?:src|srcset|data)=[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|<link\b(?![^>]*rel=[\"']?(?:canonical|prev|next))[^>]*?href=[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|url\([\"']?(?:https?:)?//[^)]+|@import\s+[\"'](?:https?:)?//[^\"']+"
)


def assemble(pages: Path = PAGES) -> None:
    """Copy every document and picture to one folder, with links that hold there."""
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    for source in (*(ROOT / "docs").iterdir(), *(ROOT / name for name in OUTSIDE)):
        name = page_name(source)
        if source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            (pages / name).write_text(with_links(text, source.parent), encoding="utf-8")
        elif source.suffix in (".png", ".svg", ".json"):
            shutil.copyfile(source, pages / name)


def page_name(source: Path) -> str:
    """Name in the site of a document or a picture."""
    return OUTSIDE.get(source.relative_to(ROOT).as_posix(), source.name)


def with_links(text: str, folder: Path) -> str:
    """`text` of a document in `folder`, whose links to other documents lead to their pages."""

    def replaced(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        is_page = target.parent == ROOT / "docs" or target in {ROOT / name for name in OUTSIDE}
        return found[1] + (page_name(target) if is_page and target.is_file() else found[2])

    return _LINK.sub(replaced, text)


def fetched_elsewhere(site: Path) -> Iterable[str]:
    """What a browser would fetch from another host to show the site, by page."""
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            for found in _FETCHED.finditer(path.read_text(encoding="utf-8")):
                yield f"{path.relative_to(site)}: {found[0]}"


def main() -> None:
    assemble()
    if sys.argv[1:] == ["assemble"]:
        return
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    if strangers := list(fetched_elsewhere(SITE)):
        raise SystemExit("the site asks other hosts:\n" + "\n".join(strangers))
    print(f"open {SITE / 'index.html'}; to search in it as well: python -m http.server -d {SITE}")


if __name__ == "__main__":
    main()
