"""Import of the libp2p that p2pinfer contains, before any other; vendor/README.md says why."""

from __future__ import annotations

import sys
from pathlib import Path

LIBP2P_VERSION = "0.8.1"
FOLDER = Path(__file__).parent / "_vendor"  # filled by the build


def use_bundled_libp2p() -> None:
    """Make `import libp2p` find the copy in this package; the folder holds no other name.

    Without the folder, in a checkout that was never installed, the environment's libp2p is used.

    Raises:
        ImportError: Another version of libp2p has been imported by this process.
    """
    imported = sys.modules.get("libp2p")
    version = getattr(imported, "__version__", LIBP2P_VERSION)
    if version != LIBP2P_VERSION:
        raise ImportError(
            f"this process has imported libp2p {version}, and p2pinfer needs the {LIBP2P_VERSION} "
            "that it brings: use p2pinfer in a process of its own"
        )
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
