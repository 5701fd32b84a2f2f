"""A hub that does not answer as it should, a model in huggingface_hub's own cache, and revisions by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
import pytest

from p2pinfer.errors import ModelNotFound
from p2pinfer.models.checkpoint.hub import open_hub
from p2pinfer.models.checkpoint.source import ModelSource, resolve_model
from p2pinfer.models.span import BlockSpan

from ..hub_server import COMMIT, HubServer
from .hub_client import CONFIG, MODEL, SHARDS, little_model

EVERYTHING = BlockSpan(0, 3)
PAGE = b"<html>please log in</html>"
# By name: what every request is answered with, and what a person is told.
OUTAGES: dict[str, tuple[int, dict[str, str], bytes, str]] = {
    "rate limit": (429, {"Retry-After": "77"}, b"{}", "answers 429 .*too many requests.* in 77 s"),
    "rate limit without a time": (429, {}, b"slow down", "answers 429 .*try again in a few minutes"),
    "wrong token": (
        401,
        {"X-Error-Message": "Invalid username or password."},
        b"{}",
        "answers 401 .*the token is not valid; .*set, renew or unset HF_TOKEN",
    ),
    "no token": (401, {}, b"{}", "answers 401 .*there is no such model, or it is private"),
    "forbidden": (403, {}, b"{}", "answers 403 .*accept the model's terms at http"),
    "gated": (403, {"X-Error-Code": "GatedRepo"}, b"{}", "is gated: accept its terms at http"),
    "broken": (500, {}, b"oops", "answers 500 .*try again later"),
    "bad gateway": (502, {}, PAGE, "answers 502 .*try again later"),
    "login page": (200, {"Content-Type": "text/html"}, PAGE, "is no hub but a page to read.*log in"),
    "captive portal": (302, {"Location": "/login"}, b"", "is no hub but a page to read.*log in"),
    "another API": (200, {"Content-Type": "application/json"}, b"[]", "is no hub"),
}


@pytest.fixture(autouse=True)
def hf_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def hub() -> Generator[HubServer]:
    with HubServer(MODEL, little_model()) as server:
        server.files |= dict.fromkeys(["generation_config.json", "special_tokens_map.json"], b"{}")
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def find(hub: HubServer, cache: Path, model: str = MODEL) -> ModelSource:
    return open_hub(model, cache_dir=cache, endpoint=hub.endpoint, pause=lambda _: None)


def fill_hf_cache(hub: HubServer, hf_cache: Path, *, commit: str = COMMIT, links: bool = True) -> Path:
    """What `hf download` leaves behind; without links as on Windows. Returns the snapshot's folder."""
    kept = hf_cache / "models--somebody--little"
    snapshot = kept / "snapshots" / commit
    for folder in (kept / "blobs", kept / "refs", snapshot):
        folder.mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    for name, content in hub.files_at(commit).items():
        if links:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            blob = kept / "blobs" / (hashlib.sha256(content).hexdigest() if hub.is_large(name) else git)
            blob.write_bytes(content)
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        else:
            (snapshot / name).write_bytes(content)
    return snapshot


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_costs_a_warning_when_everything_is_here(
    hub: HubServer, cache: Path, outage: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = find(hub, cache).spec
    find(hub, cache).fetch(EVERYTHING, embedding_and_head=True)
    told = OUTAGES[outage][3]
    hub.outage = OUTAGES[outage][:3]
    source = find(hub, cache)
    assert source.spec == spec
    assert len(source.fetch(EVERYTHING, embedding_and_head=True).names()) == 4
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    pattern = f"{told}.*; using the files of somebody/little that were downloaded before$"
    assert re.search(pattern, warning.getMessage()), warning.getMessage()


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_says_what_it_is_when_the_model_is_not_here(
    hub: HubServer, cache: Path, outage: str
) -> None:
    told = OUTAGES[outage][3]
    hub.outage = OUTAGES[outage][:3]
    with pytest.raises(ModelNotFound, match=told) as refused:
        find(hub, cache)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("outage", ["wrong token", "rate limit", "login page", "broken", "nobody", "offline"])
def test_a_model_that_is_whole_in_the_hubs_own_cache_is_used_where_it_lies(
    hub: HubServer,
    cache: Path,
    hf_cache: Path,
    outage: str,
    links: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    revision = find(hub, cache / "other").spec.revision
    snapshot = fill_hf_cache(hub, hf_cache, links=links)
    hub.requests.clear()
    endpoint = hub.endpoint
    if outage == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif outage == "nobody":
        endpoint = "http://127.0.0.1:9"
    else:
        hub.outage = OUTAGES[outage][:3]
    source = open_hub(MODEL, cache_dir=cache, endpoint=endpoint)
    assert (source.spec.model, source.spec.revision) == (MODEL, revision)
    checkpoint = source.fetch(EVERYTHING, embedding_and_head=True)
    assert checkpoint.folder == snapshot
    assert float(checkpoint.read("model.layers.2.weight")[7]) == 2.0
    assert not list(cache.glob("**/*.safetensors")), "it was copied"
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    if outage == "offline":
        assert (hub.requests, warnings) == ([], [])
    else:
        [warning] = warnings
        assert warning.getMessage().endswith("is used as huggingface_hub's own cache has it")


def test_offline_nothing_is_asked(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find(hub, cache).fetch(BlockSpan(0, 1), embedding_and_head=True)
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = find(hub, cache)
    source.fetch(BlockSpan(0, 1), embedding_and_head=True)
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE forbids to fetch it"):
        source.fetch(EVERYTHING, embedding_and_head=False)
    with pytest.raises(ModelNotFound, match=r"other/model is not here, and HF_HUB_OFFLINE forbids"):
        find(hub, cache, "other/model")
    assert hub.requests == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_part_of_a_model_in_the_hubs_own_cache_says_what_is_missing(
    hub: HubServer, cache: Path, hf_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fill_hf_cache(hub, hf_cache) / SHARDS[1]).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"has only a part of it: .*model-1\.safetensors is missing"):
        find(hub, cache)


def test_weights_of_another_commit_in_the_hubs_own_cache_are_not_fetched_again(
    hub: HubServer, cache: Path, hf_cache: Path
) -> None:
    fill_hf_cache(hub, hf_cache)
    hub.commit, hub.files["README.md"] = "e" * 40, b"a better card"
    source = find(hub, cache)
    assert source.missing_bytes(EVERYTHING, embedding_and_head=True) == 0
    checkpoint = source.fetch(EVERYTHING, embedding_and_head=True)
    assert hub.fetched() == []
    assert all((checkpoint.folder / name).is_symlink() for name in (*SHARDS, "tokenizer.json"))


def test_a_file_of_the_hubs_own_cache_that_cannot_be_used_is_fetched(
    hub: HubServer, cache: Path, hf_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, say, or one that the disk cannot read any more."""
    fill_hf_cache(hub, hf_cache)
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent.name == "blobs":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        source = find(hub, cache)
        assert source.missing_bytes(EVERYTHING, embedding_and_head=True) > 0
    blobs = hf_cache / "models--somebody--little" / "blobs"
    damaged = blobs / hashlib.sha256(hub.files[SHARDS[0]]).hexdigest()
    damaged.unlink()
    damaged.mkdir()
    hub.requests.clear()
    source.fetch(EVERYTHING, embedding_and_head=True)
    assert hub.fetched() == [SHARDS[0]]


@pytest.mark.skipif(importlib.util.find_spec("socksio") is not None, reason="SOCKS proxies work here")
@pytest.mark.parametrize("offline", [True, False])
def test_a_socks_proxy_without_its_package_costs_a_warning_at_most(
    hub: HubServer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    offline: bool,
) -> None:
    find(hub, cache).fetch(BlockSpan(0, 1), embedding_and_head=True)
    huggingface_hub.close_session()
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    source = find(hub, cache)
    source.fetch(BlockSpan(0, 1), embedding_and_head=True)
    assert ("needs a package that is not installed" in caplog.text) is not offline
    told = (
        "HF_HUB_OFFLINE forbids" if offline else "needs a package that is not installed.*pip install socksio"
    )
    with pytest.raises(ModelNotFound, match=told):
        source.fetch(EVERYTHING, embedding_and_head=False)
    with pytest.raises(ModelNotFound, match=told):
        find(hub, cache, "other/model")


def test_what_is_said_about_tokens_is_gone_without_if_it_cannot_be_had(
    hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a cache that another version filled leaves it."""
    folder = find(hub, cache).fetch(EVERYTHING, embedding_and_head=True).folder
    (folder / "special_tokens_map.json").unlink()
    hub.outage = OUTAGES["rate limit"][:3]
    assert find(hub, cache).fetch(EVERYTHING, embedding_and_head=True).folder == folder
    assert "continuing without special_tokens_map.json" in caplog.text
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match="answers 429"):
        find(hub, cache).fetch(EVERYTHING, embedding_and_head=True)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, cache: Path) -> None:
    changed = json.dumps({**CONFIG, "rope_theta": 5e5}).encode()
    older = {**hub.files, "config.json": changed, "tokenizer.json": b"[1]"}
    hub.revisions = {"v1.0": ("a" * 40, older), "refs/pr/7": ("a" * 40, older)}
    newest = find(hub, cache)
    folder = newest.fetch(EVERYTHING, embedding_and_head=True).folder
    hub.requests.clear()
    for name in ("v1.0", "refs/pr/7", "a" * 40):
        pinned = find(hub, cache, f"{MODEL}@{name}")
        assert pinned.spec.model == f"{MODEL}@{name}"
        assert pinned.spec.revision != newest.spec.revision
        assert pinned.spec.weights == newest.spec.weights
        checkpoint = pinned.fetch(EVERYTHING, embedding_and_head=True)
        assert (checkpoint.folder / "tokenizer.json").read_bytes() == b"[1]"
    assert (folder / "tokenizer.json").read_bytes() == b"{}", "the other revision's was overwritten"
    assert not {name for name in hub.fetched() if name in SHARDS}, "the same weights came twice"
    assert find(hub, cache, f"{MODEL}@{COMMIT}").spec.revision == newest.spec.revision


def test_a_commit_that_is_known_is_not_asked_for_again(hub: HubServer, cache: Path) -> None:
    find(hub, cache, f"{MODEL}@{COMMIT}").fetch(EVERYTHING, embedding_and_head=True)
    hub.requests.clear()
    find(hub, cache, f"{MODEL}@{COMMIT}").fetch(EVERYTHING, embedding_and_head=True)
    assert hub.requests == []


def test_a_revision_that_the_hub_lacks_is_named(hub: HubServer, cache: Path) -> None:
    with pytest.raises(
        ModelNotFound, match="has no revision v9 at the hub; name a branch, a tag or a commit"
    ):
        find(hub, cache, f"{MODEL}@v9")


def test_a_revision_in_the_hubs_own_cache_is_found_by_its_commit(
    hub: HubServer, cache: Path, hf_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_hf_cache(hub, hf_cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("main", COMMIT):
        assert find(hub, cache, f"{MODEL}@{name}").spec.num_blocks == 3
    with pytest.raises(ModelNotFound, match="is not here, and HF_HUB_OFFLINE forbids"):
        find(hub, cache, f"{MODEL}@v1.0")


@pytest.mark.parametrize(
    "model", ["a/b@", "a/b@../../etc", "a/b@-x", "a/b@x y", "a/b@v1@v2", "@v1", "a/b@/x"]
)
def test_what_is_no_revision_is_no_id(cache: Path, model: str) -> None:
    with pytest.raises(ModelNotFound, match="it is no id of the Hugging Face hub"):
        resolve_model(model, cache_dir=cache)
