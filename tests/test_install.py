"""What `make` shows while it installs, what it chooses, and what it says when that fails."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "install.py"


@pytest.fixture(scope="module")
def install() -> ModuleType:
    """The script, which is no part of the package."""
    spec = spec_from_file_location("install_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_is_one_line_and_its_output_is_in_the_log(
    install: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = install.Log(tmp_path / "log")
    assert log.stage("counting", python("print(*range(400), sep='\\n')"))
    assert log.stage("counting on", python("print('four hundred and one')"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("counting ... ")
    assert second.startswith("counting on ... ")
    assert first.endswith(" s")
    said = (tmp_path / "log").read_text()
    assert "\n399\n" in said
    assert "four hundred and one" in said


def test_a_stage_that_fails_shows_its_end_the_cause_and_the_log(
    install: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = install.Log(tmp_path / "log")
    assert log.stage("before", python("print('Permission denied, but that was another stage')"))
    code = "print(*range(400), sep='\\n', flush=True); exit('OSError: [Errno 28] No space left on device')"
    assert not log.stage("filling", python(code))
    with pytest.raises(SystemExit) as exited:
        log.fail()
    assert exited.value.code == 1
    told = capsys.readouterr()
    assert "filling ... failed after" in told.out
    assert "  399\n  OSError: [Errno 28] No space left on device\nmost likely: the disk is full" in told.err
    assert "\n  300\n" not in told.err
    assert str(tmp_path / "log") in told.err


def test_a_stage_that_is_killed_was_short_of_memory(install: ModuleType, tmp_path: Path) -> None:
    log = install.Log(tmp_path / "log")
    assert not log.stage("dying", python("import os; os.kill(os.getpid(), 9)"))
    assert "not enough memory" in install.likely_cause(log.output)


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        (
            "The virtual environment was not created successfully because ensurepip is not available.  On",
            "apt install python3-venv",
        ),
        ("/usr/bin/python3: No module named venv", "apt install python3-venv"),
        ("ERROR: OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: OSError: [Errno 13] Permission denied: '/x'", "written to"),
        ("  ERROR: Failed building wheel for fastecdsa\nFailed to build fastecdsa", "fastecdsa has no build"),
        ("error: command '/usr/bin/gcc' failed: No such file or directory", "a package has no build for"),
        ("ERROR: Package 'p2pinfer' requires a different Python: 3.9.2 not in '>=3.11'", "3.11 or newer"),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"
            "\nERROR: No matching distribution found for setuptools>=77",
            "PIP_CERT=FILE",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "the index has no torch==2.13.0 for"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "pip cache purge"),
        ("something that nobody has seen", ""),
    ],
)
def test_what_pip_and_venv_say_is_put_into_a_sentence(install: ModuleType, output: str, cause: str) -> None:
    found = install.likely_cause(output)
    assert cause in found
    assert bool(found) == bool(cause)


@pytest.mark.slow
def test_an_index_that_cannot_be_reached_is_what_a_real_pip_is_said_to_lack(
    install: ModuleType, tmp_path: Path
) -> None:
    log = install.Log(tmp_path / "log")
    pip = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--dest", str(tmp_path)]
    nobody = ("--index-url", "http://127.0.0.1:1/simple", "--retries", "1")
    assert not log.stage("fetching", [*pip, *nobody, "six"])
    assert "the package index cannot be reached" in install.likely_cause(log.output)


def test_a_linux_machine_without_a_card_takes_torch_from_the_index_of_cpu_builds(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_card in (False, True):
        monkeypatch.setattr(install, "has_nvidia_card", partial(bool, has_card))
        for system in ("linux", "darwin", "win32"):
            monkeypatch.setattr(sys, "platform", system)
            chosen = system == "linux" and not has_card
            assert install.torch_index({}) == (install.CPU_INDEX if chosen else "")
            assert install.torch_index({"TORCH_INDEX": ""}) == ""
            assert install.torch_index({"TORCH_INDEX": "https://example.org/cu"}) == "https://example.org/cu"


@pytest.mark.parametrize(
    ("says", "code", "has_card"),
    [
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)", 0, True),
        ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9, False),
        ("No devices were found", 0, False),
    ],
)
def test_nvidias_tool_must_list_a_card(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int, has_card: bool
) -> None:
    if Path("/proc/driver/nvidia/gpus").exists():
        pytest.skip("this machine has a card")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert install.has_nvidia_card() is has_card


def test_only_the_pinned_torch_is_kept(install: ModuleType) -> None:
    pinned = next(line for line in install.CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    version = pinned.removeprefix("torch==")
    assert install.is_pinned_torch(version)
    assert install.is_pinned_torch(f"{version}+cpu")
    assert not install.is_pinned_torch("2.6.0+cpu")
    assert not install.is_pinned_torch(None)


def test_torch_is_asked_for_alone_and_without_patience_at_an_index_that_may_not_answer(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Recorder:
        def stage(self, label: str, command: list[str]) -> bool:
            commands.append(command)
            return len(commands) == 2  # the impatient try fails

    def version_of(python: Path, name: str) -> str:
        return "2.13.0+cpu"

    monkeypatch.setattr(install, "version_of", version_of)
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    install.install_torch(Path("python"), ["pip"], Recorder())
    patient = ["pip", "--no-deps", "torch", "--extra-index-url", "https://example.org/cpu"]
    assert commands == [[*patient, *install.IMPATIENT], patient]


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    """A Python without venv, as Debian's is without python3-venv, is said to be so."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / "scripts" / "install.py").write_bytes(SCRIPT.read_bytes())
    said = "not created successfully because ensurepip is not available."
    (checkout / "venv.py").write_text(f"import os; os.mkdir('.venv'); raise SystemExit({said!r})")
    made = subprocess.run(
        [sys.executable, "scripts/install.py", ".venv"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 1
    assert made.stdout.startswith("making an environment in .venv ... failed after")
    assert "apt install python3-venv" in made.stderr
    assert "install.log" in made.stderr
    assert not (checkout / ".venv").exists()
