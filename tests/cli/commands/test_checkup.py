"""What `p2pinfer doctor` says of this computer."""

from __future__ import annotations

import json
import socket
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from p2pinfer.cli.app import run
from p2pinfer.cli.commands import checkup, doctor
from p2pinfer.cli.commands.checkup import check_all, check_card, check_disk, check_memory, fits
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.configs.published_sizes import SHAPES, Shape
from p2pinfer.models.machine import split
from p2pinfer.models.machine.memory import WEIGHTS_SHARE, FreeMemory
from p2pinfer.node.transport.identity import new_identity

CPU = ComputeConfig(device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def test_a_block_has_as_many_weights_as_transformers_makes(shape: Shape) -> None:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.feed_forward,
    )
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    assert shape.block_parameters == sum(each.numel() for each in layer.parameters() if each.dim() == 2)


def test_what_fits_is_what_a_node_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free_on(device: torch.device) -> FreeMemory:
        return FreeMemory(2 << 30)

    monkeypatch.setattr(split, "free_on", free_on)
    found = fits(tmp_path, CPU)
    assert (found[0].model, found[0].blocks, found[0].of) == ("tiny-stories", 8, 8)
    for fit, shape in zip(found[1:], SHAPES, strict=True):
        assert fit.block_bytes == 2 * shape.block_parameters
        assert fit.blocks == min(shape.blocks, int((2 << 30) * WEIGHTS_SHARE) // fit.block_bytes)
    assert str(found[1]).startswith("all 30 blocks of ")
    assert str(found[-1]).startswith("0 of 80 blocks of ")
    assert 0 < found[-3].blocks < found[-3].of


@pytest.mark.parametrize(("free", "wrong"), [(1 << 20, True), (2 << 30, False)])
def test_memory_for_not_one_block_is_wrong(free: int, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = FreeMemory(free, 4 << 30, "its control group")
    monkeypatch.setattr(checkup, "free_memory", lambda: limited)
    (finding,) = check_memory()
    assert (finding.wrong, bool(finding.advice)) == (wrong, wrong)
    assert finding.said.endswith("(limited to 4.0 GiB by its control group)")


@pytest.mark.parametrize(
    ("cards", "build", "said"),
    [
        ([], None, "no NVIDIA card"),
        (["0000:01:00.0"], None, "torch is a CPU build"),
        (["0000:01:00.0"], "12.8", "its driver is too old or not loaded"),
    ],
)
def test_a_card_that_torch_cannot_use_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: list[str], build: str | None, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    for card in cards:
        (tmp_path / card).mkdir()
    (finding,) = check_card(tmp_path)
    assert said in finding.said
    assert (finding.wrong, bool(finding.advice)) == (bool(cards), bool(cards))


def test_a_disk_is_wrong_if_it_is_full_or_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    good, bad = check_disk(tmp_path / "not" / "yet", in_the_way / "folder")
    assert (good.wrong, bad.wrong) == (False, True)
    assert str(in_the_way) in bad.advice

    def nearly_full(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=1 << 20)

    monkeypatch.setattr("shutil.disk_usage", nearly_full)
    assert all(each.wrong and "free disk space" in each.advice for each in check_disk(tmp_path, tmp_path))


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> FreeMemory:
        raise OSError("no /proc here")

    monkeypatch.setattr(checkup, "free_memory", broken)
    told: list[str] = []
    found = {each.name: each for each in check_all(tmp_path, tmp_path, told.append)}
    assert found["memory"].wrong
    assert "no /proc here" in found["memory"].said
    assert not found["data disk"].wrong
    assert told == ["torch", "card", "memory", "disk", "which models fit"]


@pytest.mark.slow
def test_the_exit_code_says_whether_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "KNOWN_S", 2.0)
    asking = ["doctor", "--listen", "/ip4/127.0.0.1/tcp/0", "--data-dir", str(tmp_path)]
    code = run(asking)
    shown, said = capsys.readouterr()
    assert code == ("failed: " in shown)  # as it is on the machine that runs this
    assert shown.endswith("failed\n" if code else "all checks passed\n")
    assert "8 blocks of tiny-stories" in shown
    assert "checking memory ..." in said
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        stranger = new_identity().peer_id
        dead = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}/p2p/{stranger}"
        assert run([*asking, "--json", "--report", "--bootstrap", dead]) == 1
    shown, said = capsys.readouterr()
    told = json.loads(shown)
    assert stranger not in shown
    assert str(Path.home()) not in shown
    about = {each["name"]: each["said"] for each in told["checks"]}
    assert f"torch {version('torch')}" in about["packages"]
    assert "bootstrap=" in about["settings"]
    assert said == ""
    wrong = {each["name"]: each["advice"] for each in told["checks"] if each["wrong"]}
    assert told["wrong"] == sum(each["wrong"] for each in told["checks"])
    assert "do not answer" in wrong["connected peers"]
    for wrongly, complaint in (
        (("--swarm-key", str(tmp_path / "nowhere.key")), "cannot be read"),
        (("--bootstrap", "192.0.2.7:4001"), "is not of the form"),
    ):
        assert run([*asking, *wrongly]) == 2
        said = capsys.readouterr().err
        assert complaint in said
        assert "checking" not in said  # nor is anything measured for nothing
