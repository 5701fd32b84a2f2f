"""A corner of the kernel for a lab: a user, a network and a mount namespace, kept by one small process.

Nothing of it touches the machine: interfaces and firewall rules live in namespaces that end with the keeper,
and `/run`, where `ip netns` keeps its names, is a tmpfs of the corner's own. An ordinary user can have that
where the kernel grants user namespaces; elsewhere root can.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROGRAMS = ("unshare", "nsenter", "ip", "iptables", "ip6tables", "sysctl", "conntrack")
ROOT = Path(__file__).resolve().parents[2]
_READY = "ready"
# Debian keeps some of these where only root's PATH leads.
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@dataclass(frozen=True, slots=True)
class Corner:
    """Namespaces that exist until the block of `open_corner` ends."""

    keeper: int  # the pid that keeps them
    rootless: bool

    def enter(self, argv: Sequence[str], *, netns: str = "") -> list[str]:
        """The command line that runs `argv` in here; in one of the named network namespaces if given.

        Every program on the way replaces the one before it, so the pid that is started is that of `argv`.
        """
        user = ["--preserve-credentials", "--user"] if self.rootless else []
        named = ["ip", "netns", "exec", netns] if netns else []
        return [_find("nsenter"), "--target", str(self.keeper), *user, "--net", "--mount", *named, *argv]

    def sh(self, commands: Sequence[str]) -> str:
        """Run shell commands, one after the other, up to the first that fails; what they printed.

        Raises:
            OSError: One failed; the message has the command and what it said.
        """
        # `-x` makes the shell write each command before it runs it, so the last one written is the culprit.
        result = subprocess.run(
            self.enter(["sh", "-ex"]),
            input="\n".join(commands),
            capture_output=True,
            text=True,
            env=environ(),
        )
        if result.returncode != 0:
            raise OSError("\n".join(result.stderr.splitlines()[-2:]))
        return result.stdout


@contextmanager
def open_corner() -> Generator[Corner]:
    """Make namespaces, and end them.

    Raises:
        OSError: The kernel or this user's rights do not allow it.
    """
    errors: list[str] = []
    for rootless in (True, False):
        if not rootless and os.geteuid() != 0:
            continue
        flags = ["--user", "--map-root-user"] if rootless else []
        script = f"mount -t tmpfs tmpfs /run && ip link set lo up && echo {_READY} && exec cat"
        keeper = subprocess.Popen(
            [_find("unshare"), *flags, "--net", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ(),
        )
        with keeper:
            assert keeper.stdin is not None
            assert keeper.stdout is not None
            assert keeper.stderr is not None
            if keeper.stdout.readline().strip() == _READY:
                try:
                    yield Corner(keeper.pid, rootless)
                finally:
                    keeper.stdin.close()  # `cat` ends, and the namespaces with it
                return
            keeper.stdin.close()
            errors.append(keeper.stderr.read().strip())
    raise OSError("; ".join(errors))


@cache
def why_not() -> str:
    """Why there can be no lab on this machine, in a line; empty if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"the lab needs {', '.join(missing)} (packages util-linux, iproute2, iptables, conntrack)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "the lab needs /dev/net/tun, and this user may not open it"
    try:
        with open_corner() as corner:
            corner.sh(_TRIAL)
    except OSError as exc:
        return f"the kernel does not let us make a lab: {' '.join(str(exc).split())}"
    return ""


_TRIAL = (
    "ip netns add trial",
    "ip -n trial link add lan0 type bridge",
    "ip link add one type veth peer name two netns trial",
    "ip tuntap add trial-tun mode tun",
    "ip netns exec trial sysctl -qw net.ipv4.ip_forward=1",
    "ip netns exec trial iptables -w -t nat -A POSTROUTING -j MASQUERADE --random-fully",
    "ip netns exec trial ip6tables -w -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT",
    "ip netns exec trial iptables -w -A INPUT -p tcp -j REJECT --reject-with tcp-reset",
    "ip netns exec trial conntrack -F",
)


def environ(**more: str) -> dict[str, str]:
    """The environment for programs in a lab: nothing of p2pinfer's, and a PATH that leads to root's tools."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PINFER_")}
    return {**kept, "PATH": _PATH, **more}


def environ_of_tests() -> dict[str, str]:
    """The same for `python -m tests...`: entering a mount namespace forgets the working directory."""
    return environ(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


def quote(argv: Sequence[str]) -> str:
    """A command line for `Corner.sh`."""
    return shlex.join(argv)


def _find(program: str) -> str:
    found = shutil.which(program, path=_PATH)
    if found is None:
        raise OSError(f"{program} is not installed")
    return str(Path(found))
