"""Manual pages say what `--help` says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import click
import pytest

from p2pinfer.cli.app import app, run
from p2pinfer.cli.commands.man import all_pages

PAGES = dict(all_pages(app, "p2pinfer"))


def test_every_command_has_a_page_with_all_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert {f"p2pinfer-{name}" for name in app.commands} | {"p2pinfer", "p2pinfer-reputation-show"} <= set(
        PAGES
    )
    assert run(["man", "reputation", "ban"]) == 0
    assert capsys.readouterr().out == PAGES["p2pinfer-reputation-ban"]
    for name, found in app.commands.items():
        page = PAGES[f"p2pinfer-{name}"]
        for param in found.get_params(click.Context(found, info_name=f"p2pinfer {name}")):
            if isinstance(param, click.Option) and not param.hidden:
                assert param.opts[-1].replace("-", "\\-") in page, (name, param.opts)


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_groff_understands_every_page() -> None:
    plainly = ["-P-c", "-P-b", "-P-o", "-P-u"]  # no letters over letters
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-rHY=0", *plainly],
        input="".join(PAGES.values()),
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    plain = done.stdout
    assert "--install-service" in plain
    assert '\'{"prompt"' in plain  # an example with quotes of every kind


def test_pages_are_written_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["man", "--out", str(tmp_path / "man1")]) == 0
    assert {path.stem for path in (tmp_path / "man1").iterdir()} == set(PAGES)
    assert f"wrote {len(PAGES)} pages" in capsys.readouterr().err
    assert run(["man", "--out", "/dev/null/man1"]) == 1


def test_a_command_that_is_not_there_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["man", "nonsense"]) == 2
    assert "there is no command p2pinfer nonsense" in capsys.readouterr().err
