"""Downloads onto disks that are full, read-only or damaged: a clear line, and what came is not lost."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
import pytest

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.hub import open_hub
from p2pinfer.models.span import BlockSpan

from ..hub_server import HubServer
from .hub_client import MODEL, little_model

FETCH = """
import shutil
import sys
from collections import namedtuple
from pathlib import Path

from p2pinfer.errors import P2PInferError
from p2pinfer.models.checkpoint.hub import open_hub
from p2pinfer.models.span import BlockSpan

# Room goes while we fetch.
shutil.disk_usage = lambda _: namedtuple("Usage", "total used free")(0, 0, 1 << 60)
try:
    source = open_hub(sys.argv[1], cache_dir=Path(sys.argv[2]), endpoint=sys.argv[3])
    source.fetch(BlockSpan(0, int(sys.argv[4])), embedding_and_head=False)
    print("fetched")
except P2PInferError as exc:
    print(f"{type(exc).__name__}: {exc}")
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    with HubServer(MODEL, little_model()) as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[list[str]]:
    """A command that runs a shell script where $DISK is a file system of 600 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=600k tmpfs {disk} && export DISK={disk} &&"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-e", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, f"{mount} true"]).returncode:
        pytest.skip("this system lets us mount nothing")
    yield [*command, mount]


def run(small_disk: list[str], script: str, hub: HubServer, tmp_path: Path) -> list[str]:
    """What a script prints; `fetch N` in it fetches the first N shards into $DISK."""
    program = tmp_path / "fetch.py"
    program.write_text(FETCH)
    fetch = f'fetch() {{ {sys.executable} {program} {MODEL} "$DISK" {hub.endpoint} "$1"; }}'
    *command, mount = small_disk
    ended = subprocess.run(
        [*command, f"{mount} true\n{fetch}\n{textwrap.dedent(script)}"],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HF_HOME": str(tmp_path / "hf")},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_what_came_is_kept(
    hub: HubServer, tmp_path: Path, small_disk: list[str]
) -> None:
    full, more = run(small_disk, "fetch 2; mount -o remount,size=2m $DISK; fetch 2", hub, tmp_path)
    assert full.startswith("ModelNotFound: there is no room left for somebody/little in ")
    assert "what has come is kept" in full
    assert more == "fetched"
    ranges = [asked for path, asked in hub.requests if path.startswith("/large/") and asked != "bytes=0-"]
    assert ranges, "nothing was taken up where it broke off"


@pytest.mark.slow
def test_a_cache_that_is_read_only_is_used_as_far_as_it_goes(
    hub: HubServer, tmp_path: Path, small_disk: list[str]
) -> None:
    first, same, more = run(small_disk, "fetch 1; mount -o remount,ro $DISK; fetch 1; fetch 2", hub, tmp_path)
    assert (first, same) == ("fetched", "fetched")
    assert more.startswith("ModelNotFound: ")
    assert "cannot be written (Read-only file system), and not all of somebody/little is there" in more
    assert "--set cache_dir=DIR" in more


def test_a_part_that_was_damaged_is_fetched_anew(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_hub(MODEL, cache_dir=tmp_path, endpoint=hub.endpoint)
    [folder] = [path.parent for path in tmp_path.glob("hub/*/*/config.json")]
    (folder / "model-0.safetensors.part").write_bytes(bytes(1000))
    caplog.set_level(logging.INFO)
    source.fetch(BlockSpan(0, 1), embedding_and_head=False)
    assert (folder / "model-0.safetensors").read_bytes() == hub.files["model-0.safetensors"]
    assert "is damaged; downloading it again" in caplog.text


def test_weights_take_no_more_disk_than_allowed(hub: HubServer, tmp_path: Path) -> None:
    def fetch(weights_bytes: int) -> None:
        source = open_hub(MODEL, cache_dir=tmp_path, weights_bytes=weights_bytes, endpoint=hub.endpoint)
        source.fetch(BlockSpan(0, 2), embedding_and_head=False)

    with pytest.raises(
        CheckpointError, match=r"of the 0\.0 GB that weights_bytes allows; raise it, or remove"
    ):
        fetch(500_000)
    assert [path for path in hub.fetched() if path.endswith("safetensors")] == []
    fetch(900_000)
    fetch(500_000)  # what is here already may be used


def test_a_listing_that_cannot_be_written_leaves_the_last_one(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_hub(MODEL, cache_dir=tmp_path, endpoint=hub.endpoint)
    [listing] = tmp_path.glob("hub/*/listing.json")
    before = listing.read_bytes()
    write_bytes = Path.write_bytes

    def fill_up(path: Path, content: bytes) -> int:
        write_bytes(path, content[:10])
        raise OSError(28, "No space left on device")

    hub.commit = "f" * 40
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_up)
        open_hub(MODEL, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert listing.read_bytes() == before
    assert [path.name for path in listing.parent.iterdir() if path.is_file()] == ["listing.json"]
