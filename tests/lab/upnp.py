"""A router that maps ports for whoever asks: miniupnpd on the LAN side of a translating router."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from .namespaces import Corner, environ

# What the daemon translates goes into chains that must be there. Distributions build it for either interface
# of the kernel; both see every packet, so the router's own rules need not be of the same one.
TABLES = {
    "iptables": """\
iptables-legacy -w -t nat -N MINIUPNPD
iptables-legacy -w -t nat -N MINIUPNPD-POSTROUTING
iptables-legacy -w -t nat -A PREROUTING -i wan0 -j MINIUPNPD
iptables-legacy -w -t nat -I POSTROUTING -o wan0 -j MINIUPNPD-POSTROUTING
iptables-legacy -w -N MINIUPNPD
""",
    "nftables": """\
nft add table inet filter
nft add chain inet filter miniupnpd
nft add chain inet filter prerouting_miniupnpd
nft add chain inet filter postrouting_miniupnpd
nft 'add chain inet filter prerouting { type nat hook prerouting priority -100; }'
nft 'add chain inet filter postrouting { type nat hook postrouting priority 100; }'
nft add rule inet filter prerouting iifname wan0 jump prerouting_miniupnpd
nft add rule inet filter postrouting oifname wan0 jump postrouting_miniupnpd
""",
}

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


@cache
def backend(program: str) -> str:
    """Which interface of the kernel the daemon was built for."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return "nftables" if "nftables" in said.stdout + said.stderr else "iptables"


def serve_upnp(corner: Corner, router: str, home: Path) -> subprocess.Popen[Any]:
    """Start it in a router; whoever starts it ends it.

    Raises:
        OSError: It is not installed.
    """
    program = miniupnpd()
    if not program:
        raise OSError("miniupnpd is not installed (package miniupnpd)")
    corner.sh([f"ip netns exec {router} {rule}" for rule in TABLES[backend(program)].splitlines()])
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
