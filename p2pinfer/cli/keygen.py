"""`p2pinfer keygen`: the key of a private swarm."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .invocation import Invocation, command
from .terminal import note, write_out


@command("keygen", examples=["p2pinfer keygen swarm.key", "p2pinfer node --swarm-key swarm.key"])
@click.argument("file", type=click.Path(path_type=Path))
def keygen(call: Invocation, file: Path) -> None:
    """Make the key of a private swarm, and write it to FILE.

    Whoever has the file can join with --swarm-key FILE, and nobody else can. Give it to members only.
    """
    from p2pinfer.node.swarm_key import make_swarm_key

    call.settings()  # ends the command before it makes anything, if that was only asked for
    make_swarm_key(file)
    if call.json:
        write_out(json.dumps({"swarm_key": str(file)}) + "\n")
    elif not call.quiet:
        note(f"wrote {file}; every node and client of the swarm takes --swarm-key {file}")
