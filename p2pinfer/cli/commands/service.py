"""A node as a service of the system: a unit of systemd, or a property list of launchd.

What is to be written and run is made first, so that it can be shown; `install` does it.
"""

from __future__ import annotations

import getpass
import os
import plistlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from p2pinfer.cli.invocation import Invocation
from p2pinfer.errors import LocalError

NAME: Final = "p2pinfer"
LABEL: Final = "org.p2pinfer.node"
# Longer than a node takes to leave: it tells the swarm for 3 s, and hands sessions over for 8.
_STOP_S: Final = 30
_PLAIN: Final = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Service:
    """A service that can be installed.

    Attributes:
        path: File that describes it to the system.
        content: Of that file.
        commands: That start it, now and at every start of the computer or login.
        hints: For people: how to look at it, how to be rid of it.
    """

    path: Path
    content: str
    commands: tuple[tuple[str, ...], ...]
    hints: tuple[str, ...]

    def describe(self) -> str:
        """Account of what installing it does, for people."""
        lines = [f"{self.path} will be written:", "", self.content.rstrip(), ""]
        lines += ["these commands will run:", *(f"  {shlex.join(each)}" for each in self.commands)]
        return "\n".join([*lines, *self.hints]) + "\n"


def options_of(call: Invocation) -> list[str]:
    """Options that give another call the same settings, and a log of the same kind."""
    words = [] if call.config_file is None else ["--config", str(call.config_file.absolute())]
    for key, flag in call.flags.items():
        if flag.name == "--set":
            words += ["--set", f"{key}={flag.value}"]
        elif flag.value is True:
            words.append(flag.name)
        else:
            values = (
                cast("tuple[object, ...]", flag.value) if isinstance(flag.value, tuple) else (flag.value,)
            )
            words += [word for value in values for word in (flag.name, str(value))]
    words += [] if call.log_level is None else ["--log-level", call.log_level]
    words += [] if call.log_format == "text" else ["--log-format", call.log_format]
    return words + ["-v"] * call.verbosity


def node_service(
    options: Sequence[str],
    *,
    for_user: bool,
    folder: Path | None = None,
    platform: str = sys.platform,
    is_root: bool | None = None,
) -> Service:
    """Service of a node with these options.

    Args:
        options: Of `p2pinfer node`.
        for_user: It belongs to this user and runs without the rights of an administrator.
        folder: In which it runs, and from which its relative paths count; by default this one.
        is_root: Whether this user is the administrator; by default the system's word.

    Raises:
        LocalError: There is no such service on this system, or it could not read p2pinfer.
    """
    folder = folder or Path.cwd()
    command = (sys.executable, "-P", "-m", NAME, "node", *options)  # -P: import nothing from the folder
    if is_root is None:
        is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if platform == "darwin":
        return _launchd(command, folder, for_user=for_user)
    if platform != "linux":
        raise LocalError(
            "services are installed by systemd and launchd only; on Windows, let the Task Scheduler run: "
            + " ".join(command)
        )
    if is_root and not for_user:
        for each in (Path(sys.executable), folder):
            _check_readable(each)
    return _systemd(command, folder, for_user=for_user, is_root=is_root)


def install(service: Service) -> None:
    """Write the file and run the commands.

    Raises:
        LocalError: The system does not let it be done; the message says what is left to do.
    """
    try:
        service.path.parent.mkdir(parents=True, exist_ok=True)
        service.path.write_text(service.content, encoding="utf-8")
    except OSError as exc:
        advice = "run this as root, or with --user" if isinstance(exc, PermissionError) else "see above"
        raise LocalError(f"{service.path} cannot be written ({exc.strerror}): {advice}") from exc
    for command in service.commands:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            raise LocalError(
                f"{service.path} is written, but `{shlex.join(command)}` failed ({exc}); run it yourself"
            ) from exc


def unit_of(command: Sequence[str], folder: Path, *, for_user: bool, is_root: bool) -> str:
    """Text of a systemd unit."""
    lines = [
        "[Unit]",
        "Description=p2pinfer node: serves blocks of a language model to a swarm",
        "After=network-online.target",
        "Wants=network-online.target",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={' '.join(_quoted(word) for word in command)}",
        f"WorkingDirectory={str(folder).replace('%', '%%')}",
        "Restart=on-failure",
        "RestartSec=10",
        f"TimeoutStopSec={_STOP_S}",
        "NoNewPrivileges=yes",
    ]
    if not for_user:
        lines += _confined(is_root=is_root)
    wanted_by = "default.target" if for_user else "multi-user.target"
    return "\n".join([*lines, "", "[Install]", f"WantedBy={wanted_by}", ""])


def _confined(*, is_root: bool) -> list[str]:
    """Lines for a service of the system: under which user it runs, and what it cannot touch."""
    if is_root:
        owner = [
            "DynamicUser=yes",
            "StateDirectory=p2pinfer",
            "CacheDirectory=p2pinfer",
            "Environment=P2PINFER_DATA_DIR=/var/lib/p2pinfer P2PINFER_CACHE_DIR=/var/cache/p2pinfer",
        ]
    else:
        owner = [f"User={getpass.getuser()}"]
    return [
        *owner,
        "PrivateTmp=yes",
        "ProtectSystem=full",
        "ProtectControlGroups=yes",
        "ProtectKernelTunables=yes",
    ]


def plist_of(command: Sequence[str], folder: Path, logs: Path, *, for_user: bool) -> str:
    """Text of a launchd property list."""
    said: dict[str, object] = {
        "Label": LABEL,
        "ProgramArguments": list(command),
        "WorkingDirectory": str(folder),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": _STOP_S,
        "ProcessType": "Background",
        "StandardOutPath": str(logs / "p2pinfer.log"),
        "StandardErrorPath": str(logs / "p2pinfer.log"),
    }
    if not for_user:
        said["UserName"] = getpass.getuser()
    return plistlib.dumps(said, sort_keys=False).decode()


def _systemd(command: Sequence[str], folder: Path, *, for_user: bool, is_root: bool) -> Service:
    unit = f"{NAME}.service"
    home = Path.home() / ".config" / "systemd" / "user"
    path = (home if for_user else Path("/etc/systemd/system")) / unit
    control = ("systemctl", "--user") if for_user else ("systemctl",)
    look = f"journalctl {'--user ' if for_user else ''}-u {NAME} -f"
    hints = [
        f"its log: {look}",
        f"to remove it: {shlex.join((*control, 'disable', '--now', unit))}; rm {path}",
    ]
    if for_user:
        hints.append("to run it also while you are logged out: loginctl enable-linger")
    return Service(
        path,
        unit_of(command, folder, for_user=for_user, is_root=is_root),
        ((*control, "daemon-reload"), (*control, "enable", "--now", unit)),
        tuple(hints),
    )


def _launchd(command: Sequence[str], folder: Path, *, for_user: bool) -> Service:
    name = f"{LABEL}.plist"
    library = Path.home() / "Library" if for_user else Path("/Library")
    path = library / ("LaunchAgents" if for_user else "LaunchDaemons") / name
    logs = library / "Logs"
    domain = f"gui/{os.getuid() if hasattr(os, 'getuid') else 501}" if for_user else "system"
    return Service(
        path,
        plist_of(command, folder, logs, for_user=for_user),
        (("launchctl", "bootstrap", domain, str(path)),),
        (f"its log: {logs / 'p2pinfer.log'}", f"to remove it: launchctl bootout {domain}/{LABEL}; rm {path}"),
    )


def _quoted(word: str) -> str:
    """A word of `ExecStart`, in which systemd replaces specifiers and variables."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if _PLAIN.fullmatch(word) else f'"{escaped}"'


def _check_readable(path: Path) -> None:
    """Nothing, if every user may reach it, as the service's own user has to."""
    for each in (path, *path.parents):
        if not each.stat().st_mode & 0o001:
            raise LocalError(
                f"a service of the system runs as a user of its own, who may not read {each}: install "
                "p2pinfer where every user can read it (pipx install --global), and run this in a folder "
                "that all can read; or use --user"
            )
