"""Full comparison of every family with transformers: `make families` writes its table.

Each family's base and each option that sets it apart, over 1 to 4 hops, and once more with the steps that a
GPU records. An option has to change transformers' logits, or it would show nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from p2pinfer.models.configs.family_rules import FAMILIES

from .parity import SPLITS, Expected, compare, differ, write_model
from .samples import SAMPLES, Sample

TABLE = Path(__file__).parents[3] / "docs" / "family_parity.json"


def measure(family: str, sample: Sample, folder: Path) -> dict[str, object]:
    """What the table says of a family."""
    base = write_model(folder / "base", family, sample.config)
    worst = compare_all(folder / "base", base)
    for name, changes in sample.variants.items():
        expected = write_model(folder / name, family, {**sample.config, **changes})
        assert differ(expected, base), f"{family}, {name}: nothing changes"
        worst = max(worst, compare_all(folder / name, expected))
    for name, changes in sample.silent.items():
        expected = write_model(folder / name, family, {**sample.config, **changes})
        assert not differ(expected, base), f"{family}, {name}: something changes"
        worst = max(worst, compare_all(folder / name, expected))
    tokens = sum(map(len, base.ids)) * (len(SPLITS) + 1) * (1 + len(sample.variants) + len(sample.silent))
    return {"options": sorted(sample.variants), "tokens": tokens, "logit": float(f"{worst:.1g}")}


def compare_all(folder: Path, expected: Expected) -> float:
    """The largest difference of a logit, over every split and with recorded steps."""
    worst = max(compare(folder, expected, split) for split in SPLITS)
    return max(worst, compare(folder, expected, SPLITS[1], recorded=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", metavar="FAMILY", help="these families; the others keep their rows"
    )
    only = parser.parse_args().only
    torch.set_num_threads(1)  # matrices this small only get slower by sharing
    found: dict[str, dict[str, object]] = {}
    if only and TABLE.exists():
        found = json.loads(TABLE.read_text(encoding="utf-8"))
    failed = False
    for family in sorted(only or FAMILIES):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[family] = measure(family, SAMPLES[family], Path(folder))
                said = str(found[family])
            except Exception as exc:
                failed = True
                said = f"FAILED {type(exc).__name__}: {str(exc)[:500]}"
        print(f"{family}: {said} ({time.perf_counter() - begun:.1f} s)", flush=True)
    if failed:
        raise SystemExit(1)
    rows = [f"  {json.dumps(family)}: {json.dumps(found[family])}" for family in sorted(found)]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
