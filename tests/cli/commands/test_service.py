"""`p2pinfer node --install-service`: what it would write and run, and what it does."""

from __future__ import annotations

import configparser
import json
import plistlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from p2pinfer.cli.app import run
from p2pinfer.cli.commands import service
from p2pinfer.cli.commands.service import Service, install, node_service
from p2pinfer.errors import LocalError

OPTIONS = ("--num-blocks", "4", "--set", "serve.max_sessions=8", "--data-dir", "/srv/a b/100%/$HOME")


def readable(path: Path) -> None:
    """Nothing: wherever the tests run, as if all could read it."""


def systemd(*, for_user: bool = True, is_root: bool = False, folder: Path = Path("/")) -> Service:
    return node_service(OPTIONS, for_user=for_user, folder=folder, platform="linux", is_root=is_root)


def sections(unit: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]  # pyright: ignore[reportAttributeAccessIssue]
    parsed.read_string(unit)
    return parsed


def test_a_unit_starts_the_node_with_its_options_word_for_word() -> None:
    unit = sections(systemd().content)
    words = shlex.split(unit["Service"]["ExecStart"])
    words = [word.replace("%%", "%").replace("$$", "$") for word in words]  # as systemd reads them
    assert words == [sys.executable, "-P", "-m", "p2pinfer", "node", *OPTIONS]
    assert int(unit["Service"]["TimeoutStopSec"]) > 8 + 3  # what a node takes to leave
    assert unit["Install"]["WantedBy"] == "default.target"


def test_a_service_of_the_system_does_not_run_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_check_readable", readable)
    of_root = sections(systemd(for_user=False, is_root=True).content)["Service"]
    assert of_root["DynamicUser"] == "yes"
    assert "P2PINFER_DATA_DIR=/var/lib/p2pinfer" in of_root["Environment"]
    monkeypatch.setattr("getpass.getuser", lambda: "anna")
    of_anna = sections(systemd(for_user=False).content)
    assert of_anna["Service"]["User"] == "anna"
    assert "DynamicUser" not in of_anna["Service"]
    assert of_anna["Install"]["WantedBy"] == "multi-user.target"


def test_a_user_of_its_own_must_be_able_to_read_everything(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(LocalError, match="may not read"):
        systemd(for_user=False, is_root=True, folder=tmp_path)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("for_user", [True, False])
def test_systemd_finds_nothing_wrong_with_it(
    for_user: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_check_readable", readable)
    made = systemd(for_user=for_user, is_root=not for_user, folder=tmp_path).content
    unit = tmp_path / "p2pinfer.service"
    if "p2pinfer.service" not in complaints(unit, made.replace("Type=exec", "Typo=exec")):
        pytest.skip("systemd-analyze does not work here")
    assert "p2pinfer.service" not in complaints(unit, made)


def complaints(unit: Path, content: str) -> str:
    unit.write_text(content)
    verify = ["systemd-analyze", "verify", "--man=no", str(unit)]
    return subprocess.run(verify, capture_output=True, text=True, timeout=60).stderr


def test_a_property_list_says_the_same_to_launchd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "anna")
    for for_user in (True, False):
        made = node_service(OPTIONS, for_user=for_user, folder=Path("/"), platform="darwin", is_root=False)
        said = plistlib.loads(made.content.encode())
        assert said["ProgramArguments"] == [sys.executable, "-P", "-m", "p2pinfer", "node", *OPTIONS]
        assert said["KeepAlive"] == {"SuccessfulExit": False}
        assert said.get("UserName") == (None if for_user else "anna")
        assert made.path.name == f"{said['Label']}.plist"
        assert made.path.parent.name == ("LaunchAgents" if for_user else "LaunchDaemons")


def test_elsewhere_it_says_what_to_do_instead() -> None:
    with pytest.raises(LocalError, match="Task Scheduler"):
        node_service((), for_user=True, platform="win32")


@pytest.mark.skipif(sys.platform != "linux", reason="shows a unit")
def test_it_is_shown_and_nothing_is_done_without_a_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["node", "--num-blocks", "4", "--allow", "clients:a.txt", "--allow", "b.txt", "--verify"]
    assert run([*argv, "--set", "serve.max_sessions=8", "--install-service", "--user"]) == 1
    said = capsys.readouterr()
    assert "nothing was installed" in said.err
    assert "systemctl --user enable --now p2pinfer.service" in said.out
    (line,) = [line for line in said.out.splitlines() if line.startswith("ExecStart=")]
    told = shlex.split(line)[5:]
    assert told == [*argv[1:], "--set", "serve.max_sessions=8"]
    assert list(tmp_path.rglob("*.service")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="shows a unit")
def test_programs_are_told_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["node", "--install-service", "--user", "--json"]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[0])
    assert said["path"] == str(tmp_path / ".config/systemd/user/p2pinfer.service")
    assert said["commands"][-1] == ["systemctl", "--user", "enable", "--now", "p2pinfer.service"]


def test_a_yes_writes_the_file_and_runs_the_commands(tmp_path: Path) -> None:
    done = tmp_path / "done"
    made = Service(tmp_path / "new" / "p2pinfer.service", "[Unit]\n", (("touch", str(done)),), ())
    install(made)
    assert made.path.read_text() == "[Unit]\n"
    assert done.exists()


def test_what_fails_is_told_with_what_is_left_to_do(tmp_path: Path) -> None:
    made = Service(tmp_path / "p2pinfer.service", "[Unit]\n", (("false", "now"),), ())
    with pytest.raises(LocalError, match="`false now` failed"):
        install(made)
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="cannot be written"):
        install(Service(tmp_path / "file" / "p2pinfer.service", "", (), ()))


def test_its_switches_belong_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--yes"]) == 2
    assert "--install-service" in capsys.readouterr().err


def test_a_wrong_option_is_found_before_anything_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--num-blocks", "0", "--install-service"]) == 2
    assert "ExecStart" not in capsys.readouterr().out
