"""`python -m tests.chaos`: a chaos run of any length. Exit code 1 if anything promised did not arrive."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from .chaos import run_chaos
from .schedule import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--duration", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, metavar="KIND", help="of faults")
    parser.add_argument("--home", type=Path, help="keep logs and all else here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p2pinfer-chaos-") as home:
        outcome = run_chaos(
            asked.seed,
            asked.duration,
            asked.home or Path(home),
            lambda line: print(line, flush=True),
            asked.kinds,
        )
    print(outcome.report(), flush=True)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
