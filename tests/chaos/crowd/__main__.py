"""`python -m tests.chaos.crowd`: attacks one node until it is killed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from .attacks import KINDS, Target
from .crowd import Crowd


def main(argv: Sequence[str] | None = None) -> None:
    """Attack until killed; `argv` None: as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.crowd")
    parser.add_argument("--peer", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument(
        "--victims", nargs="*", default=[], metavar="MULTIADDR", help="of nobody in the swarm"
    )
    parser.add_argument("--kinds", nargs="*", default=sorted(KINDS), choices=sorted(KINDS), metavar="KIND")
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--bootstrap", nargs=2, metavar=("HOME", "MULTIADDR"), help="be one as well, there")
    asked = parser.parse_args(argv)
    os.nice(19)  # it stands for machines elsewhere, and shall not take this one's processors
    target = Target(asked.peer, asked.address, asked.revision, asked.blocks, tuple(asked.victims))
    at = (Path(asked.bootstrap[0]), asked.bootstrap[1]) if asked.bootstrap else None
    trio.run(Crowd(target, asked.kinds, asked.identities, at).run)


if __name__ == "__main__":
    main()
