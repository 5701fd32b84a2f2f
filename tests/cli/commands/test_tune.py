"""`p2pinfer tune`: what it says no to, and a training over two real nodes that is killed in the middle."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from p2pinfer.cli.app import run

from ...forking import fork_server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{name} has a", "completion": " cat."} for name in ("Tom", "Lily", "Ben", "Mia")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "out"], "give --data FILE and --out FOLDER"),
        (["--data", "nowhere.jsonl", "--out", "out"], "nowhere.jsonl cannot be read"),
        (["--data", "data.jsonl", "--out", "data.jsonl"], "data.jsonl is a file; name a folder"),
        (["--data", "data.jsonl", "--out", "done"], "holds a training already"),
        (["--data", "data.jsonl", "--out", "out", "--method", "full"], "it takes lora or prompt"),
        (["--data", "data.jsonl", "--out", "out", "--rank", "0"], "rank is 0; it must be 1 or more"),
    ],
)
def test_a_wrong_request_is_told_before_anything_is_joined(
    data: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (data.parent / "done").mkdir()
    (data.parent / "done" / "adapter_config.json").write_text("{}")
    assert run(["tune", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_that_is_killed_is_continued(
    swarm_address: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "tune",
        "--bootstrap",
        swarm_address,
        "--data",
        str(data),
        "--learning-rate",
        "1e-2",
        "--rank",
        "2",
    ]
    words += ["--batch", "2", "--epochs", "4", "--checkpoint-every", "1"]
    killed = fork_server().start([*words, "--out", "killed"], cwd=tmp_path)
    assert killed.stderr is not None
    assert any("step 2 of 8" in line for line in killed.stderr)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=20)
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    assert run([*words, "--out", "killed"]) == 2  # not without --resume
    assert "--resume continues it" in capsys.readouterr().err
    assert run([*words, "--out", "killed", "--resume", "--json"]) == 0
    told, said = capsys.readouterr()
    assert "continuing after step" in said
    assert run([*words, "--out", "whole", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    resumed = json.loads(told)
    assert resumed["losses"] == pytest.approx(other["losses"], rel=1e-4)
    assert len(resumed["losses"]) == resumed["steps"] == 8
    assert resumed["losses"][-1] < resumed["losses"][0]
    for folder in ("killed", "whole"):
        assert (tmp_path / folder / "adapter_model.safetensors").exists()
        ElementTree.parse(tmp_path / folder / "loss.svg")
