"""What is refused or survived while a model is fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from p2pinfer.errors import CheckpointError, ModelNotFound, SpanOutOfRange
from p2pinfer.models.checkpoint.hub import open_hub
from p2pinfer.models.span import BlockSpan

from ..hub_server import HubServer
from .hub_client import MODEL, SHARDS, find


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: HubServer, cache: Path, pauses: list[float]
) -> None:
    hub.breaks["model-0.safetensors"] = [100_000, 0, 50_000]
    find(hub, cache, pauses).fetch(BlockSpan(0, 1), embedding_and_head=False)
    ranges = [asked for path, asked in hub.requests if path.startswith("/large/")]
    assert ranges == ["bytes=0-", "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert len(pauses) == 3


def test_an_interrupted_download_goes_on_the_next_time(hub: HubServer, cache: Path) -> None:
    class Cancel(Exception):
        pass

    class Impatient:
        seen = 0

        def start(self, label: str, total_bytes: int) -> None:
            assert (label, total_bytes) == (f"fetching {MODEL}", len(hub.files["model-0.safetensors"]))

        def advance(self, n: int) -> None:
            self.seen += n
            if self.seen:
                raise Cancel

        def done(self) -> None: ...

    source = find(hub, cache)
    hub.breaks["model-0.safetensors"] = [100_000] + [0] * 20  # so it cannot get further meanwhile
    with pytest.raises(Cancel):
        source.fetch(BlockSpan(0, 1), embedding_and_head=False, progress=Impatient())
    hub.breaks.clear()
    hub.requests.clear()
    find(hub, cache).fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert [asked for path, asked in hub.requests if path.startswith("/large/")] == ["bytes=100000-"]


def test_a_server_without_ranges_starts_over(hub: HubServer, cache: Path) -> None:
    hub.knows_ranges = False
    hub.breaks["model-0.safetensors"] = [100_000]
    checkpoint = find(hub, cache).fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert float(checkpoint.read("model.layers.0.weight").sum()) == 0.0


def test_a_part_that_is_too_long_is_begun_anew(hub: HubServer, cache: Path) -> None:
    source = find(hub, cache)
    [folder] = [path.parent for path in cache.glob("hub/*/*/config.json")]
    (folder / "model-0.safetensors.part").write_bytes(bytes(500_000))
    source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert ("/large/model-0.safetensors", "bytes=0-") in hub.requests


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_refusal_is_waited_out(
    hub: HubServer, cache: Path, pauses: list[float], status: int
) -> None:
    source = find(hub, cache, pauses)
    hub.answers["/large/model-0.safetensors"] = [status] * 9
    source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert len(pauses) == 9


def test_a_lasting_refusal_ends_in_one_line(hub: HubServer, cache: Path, pauses: list[float]) -> None:
    source = find(hub, cache, pauses)
    hub.answers["/large/model-0.safetensors"] = [503] * 10
    with pytest.raises(ModelNotFound, match=r"answers 503 when asked for somebody/little; try again later$"):
        source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    hub.answers["/large/model-0.safetensors"] = [410]
    with pytest.raises(ModelNotFound, match="answers 410"):
        source.fetch(BlockSpan(0, 1), embedding_and_head=False)


def test_a_shard_with_other_contents_is_removed_and_reported(hub: HubServer, cache: Path) -> None:
    right = hub.files["model-1.safetensors"]
    hub.served["model-1.safetensors"] = right[:-1] + b"\x07"
    source = find(hub, cache)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors does not have the hash"):
        source.fetch(BlockSpan(1, 2), embedding_and_head=False)
    assert list(cache.glob("**/model-1.safetensors*")) == list(cache.glob("**/model-1.safetensors.lock"))
    hub.served.clear()
    source.fetch(BlockSpan(1, 2), embedding_and_head=False)


def test_a_small_file_with_other_contents_is_reported_too(hub: HubServer, cache: Path) -> None:
    hub.served["config.json"] = hub.files["config.json"].replace(b"32", b"64")
    with pytest.raises(CheckpointError, match=r"config\.json does not have the hash that is published"):
        find(hub, cache)


def test_a_body_longer_or_shorter_than_published_is_refused(hub: HubServer, cache: Path) -> None:
    source = find(hub, cache)
    hub.served["model-1.safetensors"] = hub.files["model-1.safetensors"] + b"more"
    with pytest.raises(CheckpointError, match="sends more than the"):
        source.fetch(BlockSpan(1, 2), embedding_and_head=False)
    hub.served["model-0.safetensors"] = hub.files["model-0.safetensors"][:-1]
    with pytest.raises(CheckpointError, match="ends before the"):
        source.fetch(BlockSpan(0, 1), embedding_and_head=False)


def test_a_file_that_changed_on_disk_is_fetched_again(hub: HubServer, cache: Path) -> None:
    source = find(hub, cache)
    checkpoint = source.fetch(BlockSpan(1, 2), embedding_and_head=False)
    hub.fetched()
    path = checkpoint.folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    source.fetch(BlockSpan(1, 2), embedding_and_head=False)
    assert hub.fetched() == ["model-1.safetensors"]
    assert path.read_bytes() == hub.files["model-1.safetensors"]


def test_two_that_want_the_same_shard_fetch_it_once(hub: HubServer, cache: Path) -> None:
    sources = [find(hub, cache) for _ in range(2)]
    hub.fetched()
    threads = [
        threading.Thread(target=source.fetch, args=(BlockSpan(0, 3),), kwargs={"embedding_and_head": True})
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.fetched() == [*SHARDS, "tokenizer.json"]
    assert len(sources[0].fetch(BlockSpan(0, 3), embedding_and_head=True).names()) == 4


def test_what_the_hubs_own_cache_holds_is_linked(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "models--somebody--little" / "snapshots" / hub.commit
    snapshot.mkdir(parents=True)
    (snapshot / "model-0.safetensors").write_bytes(hub.files["model-0.safetensors"])
    (snapshot / "model-1.safetensors").write_bytes(b"damaged")
    source = find(hub, cache)
    hub.fetched()
    checkpoint = source.fetch(BlockSpan(0, 2), embedding_and_head=False)
    assert hub.fetched() == ["model-1.safetensors"]
    assert (checkpoint.folder / "model-0.safetensors").is_symlink()
    assert len(checkpoint.names()) == 2


def test_where_links_are_not_possible_the_shard_is_fetched(
    hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError

    snapshot = tmp_path / "hf" / "models--somebody--little" / "snapshots" / hub.commit
    snapshot.mkdir(parents=True)
    (snapshot / "model-0.safetensors").write_bytes(hub.files["model-0.safetensors"])
    monkeypatch.setattr(Path, "symlink_to", no_links)
    find(hub, cache).fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert "model-0.safetensors" in hub.fetched()


def test_an_unknown_model_is_one_line(hub: HubServer, cache: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"^the hub has no model no/such, .*set HF_TOKEN$"):
        open_hub("no/such", cache_dir=cache, endpoint=hub.endpoint)
    with pytest.raises(ModelNotFound, match="it is no id of the Hugging Face hub"):
        open_hub("no--such..", cache_dir=cache, endpoint=hub.endpoint)


def test_a_gated_model_says_where_to_accept_its_terms(hub: HubServer, cache: Path) -> None:
    hub.gated = True
    with pytest.raises(
        ModelNotFound, match=rf"is gated: accept its terms at {hub.endpoint}/somebody/little, "
    ):
        find(hub, cache)


def test_an_answer_that_is_no_listing_is_one_line(hub: HubServer, cache: Path) -> None:
    hub.extra = {"siblings": "<html>please log in</html>"}
    with pytest.raises(ModelNotFound, match="is no hub"):
        find(hub, cache)


def test_with_no_network_what_was_fetched_keeps_working(hub: HubServer, cache: Path) -> None:
    spec = find(hub, cache).spec
    find(hub, cache).fetch(BlockSpan(0, 1), embedding_and_head=False)
    nowhere = "http://127.0.0.1:9"
    source = open_hub(MODEL, cache_dir=cache, endpoint=nowhere, pause=lambda _: None)
    assert source.spec == spec
    source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    with pytest.raises(ModelNotFound, match=f"the hub at {nowhere} cannot be reached"):
        source.fetch(BlockSpan(1, 2), embedding_and_head=False)
    with pytest.raises(ModelNotFound, match="cannot be reached for other/model; connect, or set HF_ENDPOINT"):
        open_hub("other/model", cache_dir=cache, endpoint=nowhere)


def test_an_outage_of_the_hub_counts_as_no_network(hub: HubServer, cache: Path) -> None:
    find(hub, cache)
    hub.answers["/api/models/somebody/little"] = [502, 502]
    find(hub, cache)
    (cache / "hub" / "somebody--little" / "listing.json").write_text("{")
    with pytest.raises(ModelNotFound, match="answers 502"):
        find(hub, cache)


def test_a_model_that_the_hub_removed_is_not_taken_from_memory(hub: HubServer, cache: Path) -> None:
    find(hub, cache)
    hub.model = "renamed/away"
    with pytest.raises(ModelNotFound, match="has no model somebody/little"):
        find(hub, cache)


def test_the_environment_says_which_hub_and_whether_to_ask_it(hub: HubServer, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from p2pinfer.models.checkpoint.source import resolve_model\n"
        "from p2pinfer.models.span import BlockSpan\n"
        "source = resolve_model(sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "print(source.fetch(BlockSpan(0, 1), embedding_and_head=False).spec.revision)"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, MODEL, str(cache)]
    online = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    asked = len(hub.requests)
    offline = subprocess.run(
        command, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    assert online.stdout == offline.stdout == f"{find(hub, cache).spec.revision}\n"
    assert asked > 0
    command[-1] = str(cache / "empty")
    refused = subprocess.run(
        command, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert "ModelNotFound: somebody/little is not here, and HF_HUB_OFFLINE forbids" in refused.stderr


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "only pickled weights"),
        ({"config.json": b"{}", "model.gguf": b""}, "has no weights at the hub"),
        ({"config.json": b"{}", "a.safetensors": b""}, "has no weights at the hub"),
        ({"model.safetensors": b""}, r"has no config\.json at the hub"),
        ({"config.json": b"[]", "model.safetensors": b""}, "is not a JSON object"),
        ({"config.json": b'{"model_type": "bert"}', "model.safetensors": b""}, "has the model type 'bert'"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_its_weights_come(
    hub: HubServer, cache: Path, files: dict[str, bytes], reason: str
) -> None:
    hub.files = files
    with pytest.raises(CheckpointError, match=reason):
        find(hub, cache)
    assert not {name for name in hub.fetched() if name.endswith(".safetensors")}


def test_an_index_that_names_a_shard_the_hub_lacks_is_refused(hub: HubServer, cache: Path) -> None:
    del hub.files["model-1.safetensors"]
    with pytest.raises(CheckpointError, match=r"lacks the shard model-1\.safetensors"):
        find(hub, cache)


def test_weights_without_a_published_hash_are_refused(hub: HubServer, cache: Path) -> None:
    hub.has_large_storage = False
    with pytest.raises(CheckpointError, match=r"publishes no SHA-256 of model-0\.safetensors"):
        find(hub, cache)


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearly_full(_: Path) -> Usage:
        return Usage(1_000_000, 999_000, 1000)

    source = find(hub, cache)
    hub.fetched()
    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB more in .* make room"):
        source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert hub.fetched() == []


def test_a_cache_that_cannot_be_written_is_one_line(hub: HubServer, cache: Path) -> None:
    source = find(hub, cache)
    [folder] = [path.parent for path in cache.glob("hub/*/*/config.json")]
    (folder / "model-0.safetensors.part").mkdir()
    with pytest.raises(ModelNotFound, match=r"cannot be stored in .*: .*Is a directory"):
        source.fetch(BlockSpan(0, 1), embedding_and_head=False)


def test_a_span_that_the_model_lacks_is_refused(hub: HubServer, cache: Path) -> None:
    with pytest.raises(SpanOutOfRange):
        find(hub, cache).fetch(BlockSpan(2, 4), embedding_and_head=False)
