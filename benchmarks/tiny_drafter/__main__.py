"""Distil a drafter for tiny-stories from that model: python -m benchmarks.tiny_drafter [--OPTION VALUE]..."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch

from .distilling import distil
from .judging import judge
from .llama import Llama, load_llama
from .settings import SHAPE, Settings
from .writing import write_rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_drafter", description=__doc__)
    for option in fields(Settings):
        default: Any = option.default
        kind = cast("type[str]", type(default))  # or of a number
        said = f"{option.metadata['help']} ({default})"
        parser.add_argument("--" + option.name.replace("_", "-"), type=kind, default=default, help=said)
    settings = Settings(**vars(parser.parse_args()))
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    target = load_llama(settings.target_folder, settings.device, settings.dtype)
    rows = write_rows(target, settings)
    held = min(settings.held, settings.rows // 8 * 8, max(1, len(rows) // 8))
    drafter = Llama(target.config | SHAPE).to(settings.device)
    drafter.initialise()
    print(f"{sum(parameter.numel() for parameter in drafter.parameters()):,} parameters", flush=True)
    distil(target, drafter, rows[held:], settings)
    save(drafter, settings)
    judge(target, load_llama(Path(settings.out), settings.device, settings.dtype), rows[:held], settings)


def save(drafter: Llama, settings: Settings) -> None:
    """Write the drafter as a model folder in bfloat16, with the target's tokenizer."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in drafter.state_dict().items()}
    cast("Any", safetensors.torch).save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(drafter.config, indent=2) + "\n")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(settings.target_folder / name, out / name)


if __name__ == "__main__":
    main()
