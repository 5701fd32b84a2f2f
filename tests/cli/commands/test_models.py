"""`p2pinfer models`: lists, describes, checks and removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pinfer.cli.app import run
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.checkpoint.stored_model import remember_manifest
from p2pinfer.models.pieces.manifest import Manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of the bundled model, a part of which lies in the cache as if peers had given it."""
    held = resolve_model(BUNDLED_MODEL, cache_dir=tmp_path).holdings()
    folder = remember_manifest(held.manifest, tmp_path)
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes((held.folder / name).read_bytes())
    first = held.manifest.weights[0]
    (folder / first.name).write_bytes(held.paths[first.name].read_bytes())
    return held.manifest


def ask(tmp_path: Path, *argv: str) -> int:
    return run(["models", *argv, "--data-dir", str(tmp_path), "--set", f"cache_dir={tmp_path}"])


def test_the_list_has_what_is_on_the_disk(
    tmp_path: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(tmp_path, "--json") == 0
    listed = json.loads(capsys.readouterr().out)["models"]
    assert [each["model"] for each in listed] == [BUNDLED_MODEL, f"swarm:{manifest.revision}"]
    assert [each["whole"] for each in listed] == [True, False]
    assert listed[1]["bytes"] == manifest.weights[0].size
    for columns in ("40", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        assert ask(tmp_path, "list") == 0
        heading, *rows = capsys.readouterr().out.splitlines()
        assert heading.startswith("model") and len(rows) == 2
        assert f"swarm:{manifest.revision}" in rows[1]


def test_a_model_is_described_with_what_fits(
    tmp_path: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, "show", BUNDLED_MODEL, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["name_for_peers"] == f"swarm:{manifest.revision}-{manifest.words}"
    assert told["fits"] == {"auto": 8, "int8": 8, "int4": 8, "nf4": 8}
    assert told["bytes_here"] == told["bytes"] == sum(each.size for each in manifest.weights)
    assert ask(tmp_path, "show", f"swarm:{manifest.revision}") == 0
    said = capsys.readouterr().out
    assert f"swarm:{manifest.revision}" in said and "int4: 8 of 8" in said


def test_what_is_damaged_is_found_and_removed(
    tmp_path: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"swarm:{manifest.revision}"
    assert ask(tmp_path, "check", name) == 0
    assert capsys.readouterr().out == f"right    {manifest.weights[0].name}\n"
    path = tmp_path / "peers" / manifest.revision / manifest.weights[0].name
    path.write_bytes(bytes(manifest.weights[0].size))
    assert ask(tmp_path, "check", name) == 1
    out, err = capsys.readouterr()
    assert out == f"damaged  {manifest.weights[0].name}\n" and "models pull" in err
    assert not path.exists()
    assert ask(tmp_path, "check", name, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"model": name, "files": []}


def test_a_model_is_removed_once(
    tmp_path: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, "remove", f"swarm:{manifest.revision}") == 0
    assert "free again" in capsys.readouterr().err
    assert ask(tmp_path, "remove", f"swarm:{manifest.revision}") == 1
    assert "p2pinfer models" in capsys.readouterr().err
    assert ask(tmp_path, "remove", BUNDLED_MODEL) == 2


def test_pulling_what_is_here_says_where(
    tmp_path: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, "pull", BUNDLED_MODEL) == 0
    assert "tiny-stories is here: 19.9 MiB" in capsys.readouterr().err
    assert ask(tmp_path, "pull", BUNDLED_MODEL, "--blocks", "0:2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["revision"] == manifest.revision
    assert ask(tmp_path, "pull", BUNDLED_MODEL, "--blocks", "7:99") == 2
