"""Every file that people write is read as their editors and shells write it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import p2pinfer.models
import p2pinfer.node
import p2pinfer.reputation
import p2pinfer.routing
from p2pinfer.client_config import GenerationConfig
from p2pinfer.config import load_settings
from p2pinfer.errors import CheckpointError, ConfigError, LocalError
from p2pinfer.models.checkpoint.source import resolve_model
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.swarm.bootstrap import FILE_NAME, bootstrap_peers
from p2pinfer.node.transport.connection_gate import Gate
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.swarm_key import load_swarm_key, make_swarm_key
from p2pinfer.reputation.exchange import export_ledger, import_ledger
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.text_files import decode_text, is_text, read_text

PEER = new_identity().peer_id

Write = Callable[[Path, str], Path]


def _as_it_is(text: str) -> bytes:
    return text.encode()


def _notepad(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode("utf-8-sig")


def _powershell(text: str) -> bytes:
    return ("\ufeff" + text.replace("\n", "\r\n")).encode("utf-16-le")


def _big_endian(text: str) -> bytes:
    return ("\ufeff" + text).encode("utf-16-be")


@pytest.fixture(params=[_as_it_is, _notepad, _powershell, _big_endian])
def write(request: pytest.FixtureRequest) -> Write:
    """Writes a text file as one of four programs does."""

    def write(path: Path, text: str) -> Path:
        path.write_bytes(request.param(text))
        return path

    return write


def test_a_mark_is_no_part_of_a_text(write: Write, tmp_path: Path) -> None:
    text = "Caf\u00e9 \u2192 \U0001f600"
    assert read_text(write(tmp_path / "text", text)) == text


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\xff\xfea", b"caf\xe9", b"\x80"])
def test_what_is_no_text_is_refused(content: bytes) -> None:
    with pytest.raises(UnicodeDecodeError):
        decode_text(content)


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert is_text("\U0001f600 \ufffd")
    assert not is_text("caf\udce9")
    assert not is_text("\ud83d")


def test_settings(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path / "own.toml", '# caf\u00e9\n[generation]\ntop_k = 7\nstop = ["\u2192"]\n')
    config = load_settings(GenerationConfig, environ={}, file=path).build(GenerationConfig)
    assert (config.top_k, config.stop) == (7, ("\u2192",))


def test_bootstrap_peers(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}"
    write(tmp_path / FILE_NAME, f"{address}\n# ours\n")
    assert [peer.addrs for peer in bootstrap_peers((), tmp_path)] == [(address,)]


def test_lists_of_peers(write: Write, tmp_path: Path) -> None:
    listed = write(tmp_path / "friends", f"{PEER}  # caf\u00e9\n")
    assert Gate(HostConfig(allow=(str(listed),))).admits(PEER)
    assert not Gate(HostConfig(deny=(str(listed),))).admits(PEER)


def test_swarm_keys(write: Write, tmp_path: Path) -> None:
    make_swarm_key(tmp_path / "key")
    key = write(tmp_path / "copied", (tmp_path / "key").read_text())
    assert load_swarm_key(key) == load_swarm_key(tmp_path / "key")


def test_exported_ledgers(write: Write, tmp_path: Path) -> None:
    exported = write(tmp_path / "ledger.json", export_ledger(Ledger(banned=[PEER])).decode())
    ledger = Ledger()
    assert import_ledger(ledger, exported.read_bytes(), 1.0) == 1
    assert ledger.is_banned(PEER)


def test_the_files_of_a_model(write: Write, tiny_stories: Path, tmp_path: Path) -> None:
    """All of them, and the revision is that of the original."""
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "model"))
    expected = load_tokenizer(folder).encode("Once upon a time")
    files = sorted(folder.glob("*.json"))
    assert len(files) >= 4
    for path in files:
        write(path, path.read_text(encoding="utf-8"))
    original = resolve_model("tiny-stories", cache_dir=tmp_path)
    assert resolve_model(str(folder), cache_dir=tmp_path).spec.revision == original.spec.revision
    assert load_tokenizer(folder).encode("Once upon a time") == expected


def test_a_model_whose_files_name_half_a_character_is_used(tiny_stories: Path, tmp_path: Path) -> None:
    """JSON can say "\\ud800"; a token of that name cannot be, and nothing else depends on it."""
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "model"))
    for name in ("tokenizer_config.json", "config.json"):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, "_name_or_path": "\ud800", "eos_token": "\udc00"}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_tokenizer(folder).encode("Once") == load_tokenizer(tiny_stories).encode("Once")
    assert resolve_model(str(folder), cache_dir=tmp_path).spec.num_blocks == 8
    (folder / "tokenizer.json").write_text('{"model": "\\ud800"}')
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(folder)


def _read_settings(path: Path) -> object:
    return load_settings(environ={}, file=path)


def _read_list(path: Path) -> object:
    return Gate(HostConfig(allow=(str(path),)))


def _read_ledger(path: Path) -> object:
    return import_ledger(Ledger(), path.read_bytes(), 1.0)


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (_read_settings, ConfigError),
        (_read_list, ConfigError),
        (load_swarm_key, ConfigError),
        (_read_ledger, LocalError),
    ],
)
def test_a_file_that_is_no_text_is_an_error_of_ours(
    read: Callable[[Path], object], error: type[LocalError], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    for content in (b"caf\xe9", b"\xff\xfea"):
        path.write_bytes(content)
        with pytest.raises(error):
            read(path)


def test_no_file_of_people_is_read_in_another_way() -> None:
    """What is opened as text elsewhere would keep the mark, or fail on it; bytes are for JSON and keys."""
    packages = (p2pinfer, p2pinfer.models, p2pinfer.node, p2pinfer.reputation, p2pinfer.routing)
    found = {
        path.name
        for package in packages
        for path in Path(package.__path__[0]).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(?<!text_files)\.read_text\(|\.open\(encoding|Tokenizer\.from_file", line)
    }
    # Resume tokens, which this program wrote itself, files of the kernel, and a table of its own.
    assert found == {"saved_state.py", "control_groups.py", "family_rules.py"}
