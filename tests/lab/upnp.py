"""A router that maps ports for whoever asks: miniupnpd on the LAN side of a translating router."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from .namespaces import Corner, environ

RULES = (
    "iptables-legacy -w -t nat -N MINIUPNPD",
    "iptables-legacy -w -t nat -N MINIUPNPD-POSTROUTING",
    "iptables-legacy -w -t nat -A PREROUTING -i wan0 -j MINIUPNPD",
    "iptables-legacy -w -t nat -I POSTROUTING -o wan0 -j MINIUPNPD-POSTROUTING",
    "iptables-legacy -w -N MINIUPNPD",
    "iptables-legacy -w -I FORWARD -i wan0 ! -o wan0 -j MINIUPNPD",
)

CONFIGURATION = """\
ext_ifname=wan0
listening_ip=lan0
enable_natpmp=no
enable_upnp=yes
secure_mode=yes
system_uptime=yes
notify_interval=30
uuid=5b0f6c8a-58c1-4f1e-8a3e-9f6b7c1d2e3f
serial=1
model_number=1
lease_file={lease_file}
allow 1024-65535 192.168.1.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""


def miniupnpd() -> str:
    """Where the program is, or an empty string."""
    return shutil.which("miniupnpd", path=environ()["PATH"]) or ""


def serve_upnp(corner: Corner, router: str, home: Path) -> subprocess.Popen[Any]:
    """Start it in a router; whoever starts it ends it.

    Raises:
        OSError: It is not installed.
    """
    program = miniupnpd()
    if not program:
        raise OSError("miniupnpd is not installed (package miniupnpd)")
    corner.sh([f"ip netns exec {router} {rule}" for rule in RULES])
    configuration = home / f"{router}-miniupnpd.conf"
    configuration.write_text(CONFIGURATION.format(lease_file=home / f"{router}-leases"))
    # -d keeps it in the foreground.
    argv = [program, "-d", "-f", str(configuration), "-P", str(home / f"{router}-miniupnpd.pid")]
    with (home / f"{router}-miniupnpd.log").open("w") as log:
        return subprocess.Popen(
            corner.enter(argv, netns=router),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ(),
        )
