"""`p2pinfer plan`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.cli.app import run
from p2pinfer.models.checkpoint.source import bundled_folder

SEVENTY = ("meta-llama/Llama-3.3-70B-Instruct", "--read-rate", "50GB/s")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run(["plan", *argv, "--json"]) == 0, capsys.readouterr().err
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_model_that_the_hub_keeps_is_planned_by_its_published_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = planned(capsys, *SEVENTY, "--peers", "8", "--up", "20Mbit", "--rtt", "50")
    (plan,) = said["plans"]
    assert (said["num_blocks"], plan["blocks"], plan["hops"]) == (80, 10, 8)
    assert said["assumed"]["up_bytes_per_s"] == 2.5e6
    assert plan["up_bytes_per_token"] == 16384
    assert plan["compute_s"] == pytest.approx(80 * said["block_bytes"] / 50e9)
    assert plan["fits"] is None


def test_people_get_a_row_for_each_number_of_peers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["plan", *SEVENTY, "--peers", "4,16", "--memory", "24GiB"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == "meta-llama/Llama-3.3-70B-Instruct"
    (table,) = [index for index, line in enumerate(lines) if line.startswith("peers")]
    assert [line.split()[0] for line in lines[table + 1 : table + 3]] == ["4", "16"]
    assert [line.split()[-1] for line in lines[table + 1 : table + 3]] == ["no", "yes"]
    assert "9 peers are the fewest" in said.out


def test_no_line_is_wider_than_a_plain_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["plan", *SEVENTY, "--memory", "1GiB"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "Not one block fits" in said


def test_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without weights, and the config by itself."""
    shutil.copy(bundled_folder("tiny-stories") / "config.json", tmp_path)
    whole = planned(capsys, "tiny-stories", "--read-rate", "1GB/s")
    for model in (tmp_path, tmp_path / "config.json"):
        said = planned(capsys, str(model), "--read-rate", "1GB/s")
        assert said["plans"] == whole["plans"]


def test_without_a_rate_peers_are_like_this_computer(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "tiny-stories", "--peers", "2")
    assert 0 < said["assumed"]["block_s"] < 1
    assert said["plans"][0]["hops"] == 2


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--peers", "0"), "1 to 256"),
        (("--peers", "many"), "--peers many"),
        (("--up", "quick"), "--up quick"),
        (("--memory", "-1"), "--memory -1"),
        (("--rtt", "-3"), "above 0"),
        (("--prompt", "0"), "above 0"),
        (("--weights", "int5"), "int5"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    argv: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *SEVENTY, *argv]) == 2
    assert reason in capsys.readouterr().err


def test_a_model_of_nobody_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "nobody/nothing-70B", "--read-rate", "1GB/s"]) != 0
    assert "nobody/nothing-70B" in capsys.readouterr().err
