"""`python -m tests.fuzz`: atheris against every decoder of what peers say of each other.

    run [--duration SECONDS] [--seed N] [--corpus FOLDER]     coverage-guided; exit code 0: nothing was found
    replay FOLDER                                             every input of a corpus once, for coverage.py

An input's first byte names the target. Half of the mutations are libFuzzer's, of bytes; half change a value
and keep the form (rewrite.py). An input that takes over two seconds or 768 MiB of memory is a finding too.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

SLOWEST_S = 2
MOST_MIB = 768
MOST_BYTES = 1 << 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="look for findings")
    running.add_argument("--duration", type=int, default=600, metavar="SECONDS")
    running.add_argument("--seed", type=int, default=1)
    running.add_argument("--corpus", type=Path, help="where inputs that reach something new are kept")
    replaying = commands.add_parser("replay", help="run a corpus once")
    replaying.add_argument("corpus", type=Path)
    asked = parser.parse_args()
    if asked.command == "replay":
        replay(asked.corpus)
    elif asked.corpus is not None:
        asked.corpus.mkdir(parents=True, exist_ok=True)
        fuzz(asked.corpus, asked.duration, asked.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            fuzz(Path(folder), asked.duration, asked.seed)


def fuzz(corpus: Path, duration_s: int, seed: int) -> None:
    """Run libFuzzer; does not return."""
    # Not among the dependencies of the tests: it has no wheel for some Pythons that p2pinfer runs on.
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["p2pinfer"]):
        targets = importlib.import_module("tests.fuzz.targets").targets()
    from .rewrite import rewrite

    for index, target in enumerate(targets):
        for number, seeded in enumerate(target.seeds):
            (corpus / f"seed-{target.name}-{number}").write_bytes(bytes([index]) + seeded)

    def attack(given: bytes) -> None:
        if given:
            targets[given[0] % len(targets)].run(given[1:])

    def mutate(given: bytes, most: int, chance: int) -> bytes:
        rng = random.Random(chance)
        if len(given) < 2 or rng.random() < 0.5:
            return bytes(atheris.Mutate(given, most))
        return (given[:1] + rewrite(given[1:], rng))[:most]

    options = [
        f"-max_total_time={duration_s}",
        f"-seed={seed}",
        f"-timeout={SLOWEST_S}",
        f"-rss_limit_mb={MOST_MIB}",
        f"-max_len={MOST_BYTES}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], attack, custom_mutator=mutate)
    atheris.Fuzz()


def replay(corpus: Path) -> None:
    """Run every input of a corpus, and say how many there were for each target."""
    from .targets import targets

    found = targets()
    counts = dict.fromkeys((target.name for target in found), 0)
    for path in sorted(corpus.iterdir()):
        given = path.read_bytes()
        if given:
            target = found[given[0] % len(found)]
            target.run(given[1:])
            counts[target.name] += 1
    print("  ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
