#!/usr/bin/env bash
# One would guess: an address that names a peer by its CID and one that names it in base58 are the same multiaddr. The
# specification of peer ids has both read, the text is only a way to write the binary form, and there a peer is its
# multihash.
# So it is for the text: multiaddr reads both and prints both in base58. The binary form keeps the difference, the CID
# with its two bytes of version and codec or the multihash alone. So two addresses that print alike are not equal and
# do not find each other in a set, one read back from its own text is another than it was, and on the wire the peer has
# an id that is no multihash. Who compares addresses compares their texts, or those read back from them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet \
    multiaddr==0.2.0 base58==2.1.1 py-multibase==2.0.0 py-cid==0.5.0 py-multihash==3.0.0
cat >"$work/look.py" <<'PY'
from importlib.metadata import version

import base58
import multibase
from multiaddr import Multiaddr

print("multiaddr", version("multiaddr"))
PLAIN = "12D3KooWEfY2TmhEWp1scTkNTgGcB6sBdaeicFJXJjeBmUpFMyg8"
MULTIHASH = base58.b58decode(PLAIN)
other = Multiaddr(f"/p2p/{PLAIN}")
for base in ("base32", "base36"):
    written = multibase.encode(base, b"\x01\x72" + MULTIHASH).decode()  # version 1, codec libp2p-key
    one = Multiaddr(f"/p2p/{written}")
    print(f"{base}: /p2p/{written}")
    print("  printed:", one)
    print("  printed like the one in base58:", str(one) == str(other), "| equal to it:", one == other)
    print("  peers in a set of both:", len({one, other}))
    print("  binary:", one.to_bytes()[:8].hex(), "...,", len(one.to_bytes()), "bytes; the other", other.to_bytes()[:8].hex())
    print("  read back from its own text, equal to itself:", Multiaddr(str(one)) == one)
    assert str(one) == str(other) == f"/p2p/{PLAIN}"
    assert one != other and len({one, other}) == 2 and Multiaddr(str(one)) != one
    assert one.to_bytes()[3:] == b"\x01\x72" + MULTIHASH and other.to_bytes()[3:] == MULTIHASH
PY
"$work/venv/bin/python" "$work/look.py"
