"""Installs p2pinfer for `make`: one line a stage, all of pip's output in a log, and the cause when it fails.

    python3 scripts/install.py ENVIRONMENT [PIP ARGUMENTS ...]

makes the environment if it is not there; with arguments, installs torch if it is not there, and then what the
arguments name. Only the standard library, since it runs before there is an environment.

A Linux machine without an NVIDIA card gets torch from the index of its CPU builds, which saves 2.7 GB.
TORCH_INDEX names another index, or, empty, none. pip's own configuration holds beside it: indexes, mirrors,
proxies.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

CHECKOUT = Path(__file__).resolve().parent.parent
CONSTRAINTS = CHECKOUT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # -- pytorch.org, "Start Locally"
# An index that does not answer holds pip up for half a minute then, instead of for minutes. torch alone is
# asked for there, since pip would otherwise wait once for every package.
IMPATIENT = ("--retries", "1", "--timeout", "15")
TAIL = 12  # lines of output shown when a stage fails

# What pip and venv say, and what that means for whoever wanted to see a story. The first that fits is told.
CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"ensurepip is not available|No module named '?(venv|ensurepip)",
        "this Python cannot make environments; on Debian and Ubuntu: apt install python3-venv",
    ),
    (
        r"No space left on device|Disk quota exceeded",
        "the disk is full: {free} are free, and 3 GB are needed",
    ),
    (r"Permission denied|Read-only file system", "this folder cannot be written to; check out where you may"),
    (r"MemoryError|Cannot allocate memory|^Killed", "there was not enough memory"),
    (r"DO NOT MATCH THE HASHES", "a download was damaged; try again, or first: pip cache purge"),
    (
        r"Failed building wheel for (?P<name>\S+)|Failed to build (?P<names>\S+)"
        r"|command '\S*(cc|clang|cl.exe)\S*' failed",
        "{name} has no build for Python {python} on {machine}, and nothing is to be compiled; another Python "
        "from 3.11 to 3.14 may have one: make PYTHON=...",
    ),
    (r"requires a different Python", "Python {python} does not do; 3.11 or newer does: make PYTHON=..."),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError",
        "the index's certificate is not trusted; behind a proxy that has its own, PIP_CERT=FILE names it",
    ),
    (
        r"NameResolutionError|name resolution|establish a new connection|NewConnectionError|unreachable"
        r"|ProxyError|ConnectTimeout|ReadTimeout|timed out|Connection (refused|reset|aborted)"
        r"|RemoteDisconnected|IncompleteRead",
        "the package index cannot be reached; see to the network, or name a mirror: PIP_INDEX_URL=https://...",
    ),
    (
        r"No matching distribution found for (?P<name>\S+)",
        "the index has no {name} for Python {python} on {machine}; another Python from 3.11 to 3.14 may do: "
        "make PYTHON=...",
    ),
)


def main(arguments: Sequence[str]) -> None:
    environment, *wanted = arguments
    log = Log(CHECKOUT / "install.log")
    python = Path(environment, "Scripts" if os.name == "nt" else "bin", "python")
    if not python.exists():
        log.path.unlink(missing_ok=True)
        make = [sys.executable, "-m", "venv", environment]
        if not log.stage(f"making an environment in {environment}", make):
            shutil.rmtree(environment, ignore_errors=True)
            log.fail()
    if wanted:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        pip += ["--constraint", str(CONSTRAINTS)]
        if not is_pinned_torch(version_of(python, "torch")):
            install_torch(python, pip, log)
        if not log.stage(f"installing {describe(wanted)}", [*pip, *wanted]):
            log.fail()


def install_torch(python: Path, pip: list[str], log: Log) -> None:
    """Install torch alone; what it depends on comes with p2pinfer."""
    index = torch_index(os.environ)
    torch = [*pip, "--no-deps", "torch"]
    if not index:
        if not log.stage("installing torch", torch):
            log.fail()
        return
    torch += ["--extra-index-url", index]
    label = "installing the CPU build of torch" if index == CPU_INDEX else f"installing torch from {index}"
    if not log.stage(label, [*torch, *IMPATIENT]) and not log.stage(f"{label}, more patiently", torch):
        log.fail()
    version = version_of(python, "torch") or ""
    if index == CPU_INDEX and "+" not in version and platform.machine() == "x86_64":
        print(
            f"  {index} did not answer: this torch is made for NVIDIA cards, and what it needs takes 2.7 GB"
        )


def torch_index(environ: Mapping[str, str]) -> str:
    """The index to look for torch in besides pip's own; empty for none."""
    chosen = environ.get("TORCH_INDEX")
    if chosen is not None:
        return chosen.strip()
    return CPU_INDEX if sys.platform == "linux" and not has_nvidia_card() else ""


def is_pinned_torch(version: str | None) -> bool:
    """Whether a version is the one of constraints.txt, whatever it was built for."""
    return (
        version is not None and f"torch=={version.partition('+')[0]}" in CONSTRAINTS.read_text().splitlines()
    )


def has_nvidia_card() -> bool:
    """Whether a driver knows of one; its tools alone, which some images bring, do not count."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    tool = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def version_of(python: Path, name: str) -> str | None:
    """The installed version of a package, without importing it."""
    ask = f"from importlib.metadata import version; print(version({name!r}))"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    return told.stdout.strip() if told.returncode == 0 else None


def describe(wanted: Sequence[str]) -> str:
    what = wanted[-1]
    if what.endswith("]"):
        return "what the tests need"
    return "p2pinfer and what it needs" if what == "." else f"{Path(what).name} and what it needs"


class Log:
    """The file that holds what the stages' commands print, and the lines on the terminal in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = ""  # of the last stage

    def stage(self, label: str, command: Sequence[str]) -> bool:
        """Run a command behind one line that ends with its seconds; whether it succeeded."""
        begin = time.monotonic()
        with self.path.open("a+", encoding="utf-8", errors="replace") as file:
            file.seek(0, os.SEEK_END)
            start = file.tell()
            file.write(f"\n$ {' '.join(command)}\n")
            file.flush()
            print(f"{label} ... ", end="", flush=True)
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
            try:
                self._wait(process, label, begin)
            except KeyboardInterrupt:
                process.wait()
                print("stopped")
                sys.exit(130)
            file.seek(start)
            self.output = file.read()
        failed = process.returncode != 0
        took = f"{time.monotonic() - begin:.0f} s"
        print(f"failed after {took}" if failed else took, flush=True)
        if process.returncode < 0:
            self.output += "\nKilled"
        return not failed

    def fail(self) -> NoReturn:
        """Say what the last stage said at its end, the likely cause, and where the rest is; exit with 1."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        print(*(f"  {line}" for line in lines[-TAIL:]), sep="\n", file=sys.stderr)
        cause = likely_cause(self.output)
        if cause:
            print(f"most likely: {cause}", file=sys.stderr)
        print(f"everything that was said: {self.path}", file=sys.stderr)
        sys.exit(1)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], label: str, begin: float) -> None:
        while sys.stdout.isatty():  # else the line would be written once a second
            try:
                process.wait(1)
                print(f"\r{label} ... ", end="", flush=True)
                return
            except subprocess.TimeoutExpired:
                print(f"\r{label} ... {time.monotonic() - begin:.0f} s ", end="", flush=True)
        process.wait()


def likely_cause(output: str) -> str:
    """What a failed command's output points to, in a sentence; empty if to nothing known."""
    for pattern, sentence in CAUSES:
        if found := re.search(pattern, output, re.MULTILINE):
            named = [value for value in found.groupdict().values() if value]
            return sentence.format(
                name=named[0] if named else "a package",
                python=platform.python_version(),
                machine=f"{platform.system()} {platform.machine()}",
                free=f"{shutil.disk_usage(CHECKOUT).free / 1e9:.1f} GB",
            )
    return ""


if __name__ == "__main__":
    main(sys.argv[1:])
