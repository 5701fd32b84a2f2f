"""Models on the disk: listed, checked, removed."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from p2pinfer.cli.models.library import check_files, held_models, remove_model, swarm_name
from p2pinfer.errors import ConfigError, ModelNotFound
from p2pinfer.models.checkpoint.checkpoint import INDEX
from p2pinfer.models.checkpoint.hub import open_hub
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.checkpoint.stored_model import remember_manifest
from p2pinfer.models.pieces.manifest import parse_swarm_name
from p2pinfer.models.span import BlockSpan

from ...models.checkpoint.hub_client import MODEL, little_model
from ...models.hub_server import HubServer


def test_a_model_that_came_from_peers_is_listed_by_a_name_that_has_it_whole(tmp_path: Path) -> None:
    bundled = resolve_model(BUNDLED_MODEL, cache_dir=tmp_path).holdings()
    folder = remember_manifest(bundled.manifest, tmp_path)
    for text in bundled.manifest.texts:
        (folder / text.name).write_bytes((bundled.folder / text.name).read_bytes())
    first = bundled.manifest.weights[0]
    (folder / first.name).write_bytes(bundled.paths[first.name].read_bytes())
    own, stored = held_models(tmp_path)
    assert (own.name, own.kind, own.is_whole) == (BUNDLED_MODEL, "bundled", True)
    assert stored.name == str(swarm_name(bundled)) and parse_swarm_name(stored.name)
    assert (stored.kind, stored.is_whole, stored.bytes_here) == ("peers", False, first.size)
    assert stored.revision == own.revision
    source = resolve_model(stored.name, cache_dir=tmp_path)
    assert [each.is_right for each in check_files(source, tmp_path)] == [True]
    (folder / first.name).write_bytes(bytes(first.size))
    assert [each.is_right for each in check_files(source, tmp_path)] == [False]
    assert not (folder / first.name).exists()
    assert remove_model(stored.name, tmp_path) > 0
    with pytest.raises(ModelNotFound):
        resolve_model(stored.name, cache_dir=tmp_path)
    with pytest.raises(ModelNotFound, match="lists what is"):
        remove_model(stored.name, tmp_path)


def test_a_model_of_the_hub_is_listed_without_a_question_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    with HubServer(MODEL, little_model()) as hub:
        source = open_hub(MODEL, cache_dir=tmp_path, endpoint=hub.endpoint)
        source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    huggingface_hub.close_session()
    _, held = held_models(tmp_path)
    assert (held.name, held.kind, held.revision) == (MODEL, "hub", source.spec.revision)
    assert 0 < held.bytes_here < held.bytes_whole
    assert source.holdings().is_open  # the hub asks nobody for a password
    for text in held.folder.glob("config.json"):
        text.unlink()
    assert [each.revision for each in held_models(tmp_path)[1:]] == [""]
    (tmp_path / "hub" / MODEL.replace("/", "--") / "listing.json").write_text("{")
    assert [each.revision for each in held_models(tmp_path)[1:]] == [""]
    assert remove_model(MODEL, tmp_path) > 0 and len(held_models(tmp_path)) == 1


def test_only_what_p2pinfer_fetched_is_removed(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in (BUNDLED_MODEL, str(tmp_path / "own")):
        with pytest.raises(ConfigError):
            remove_model(name, tmp_path / "cache")
    for name in ("somebody/else", "..", "../..", "", "swarm:" + "0" * 32):
        with pytest.raises((ModelNotFound, ConfigError)):
            remove_model(name, tmp_path / "cache")
    assert (tmp_path / "own").is_dir() and INDEX
