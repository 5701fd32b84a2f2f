from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from p2pinfer.errors import ModelNotFound, SpanOutOfRange
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.span import BlockSpan


def test_the_bundled_model_is_found_by_its_name(tiny_stories: Path, tmp_path: Path) -> None:
    source = resolve_model(BUNDLED_MODEL, cache_dir=tmp_path)
    assert (source.spec.model, source.spec.num_blocks) == ("tiny-stories", 8)
    assert source.spec.revision == "3ce048eef7cf5724119918f197959a44"
    assert source.fetch(None, embedding_and_head=True).folder.samefile(tiny_stories)


def test_a_folder_is_known_by_its_own_name_and_has_the_same_revision(
    tiny_stories: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "elsewhere"))
    source = resolve_model(f"{folder}/", cache_dir=tmp_path)
    assert source.spec.model == "elsewhere"
    assert source.spec.revision == resolve_model(BUNDLED_MODEL, cache_dir=tmp_path).spec.revision


def test_a_folder_is_fetched_whole(tmp_path: Path) -> None:
    source = resolve_model(BUNDLED_MODEL, cache_dir=tmp_path)
    checkpoint = source.fetch(BlockSpan(2, 4), embedding_and_head=False)
    assert checkpoint.block_names(3)
    assert source.fetch(None, embedding_and_head=True).names() == checkpoint.names()


def test_a_span_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpanOutOfRange, match="0:8"):
        resolve_model(BUNDLED_MODEL, cache_dir=tmp_path).fetch(BlockSpan(4, 9), embedding_and_head=False)


@pytest.mark.parametrize(
    "model", ["./nothing-here", "/no/such/folder", "~/no/such/folder", "a/b/c", "", "what ever"]
)
def test_a_name_that_can_be_nothing_is_refused_without_asking_the_hub(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no folder"):
        resolve_model(model, cache_dir=tmp_path)


def test_a_file_is_no_model(tiny_stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a file; name a GGUF file"):
        resolve_model(os.fspath(tiny_stories / "config.json"), cache_dir=tmp_path)
