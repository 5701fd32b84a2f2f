"""`p2pinfer keygen`: the key of a private swarm, or a client's lasting identity."""

from __future__ import annotations

import json
from pathlib import Path

import click

from p2pinfer.cli.invocation import Invocation, command
from p2pinfer.cli.output.terminal import note, write_out


@command(
    "keygen",
    examples=[
        "p2pinfer keygen swarm.key",
        "p2pinfer node --swarm-key swarm.key",
        "p2pinfer keygen --identity client.key",
        "p2pinfer generate --identity client.key ...",
    ],
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--identity", is_flag=True, help="Make a client's lasting name instead, and print its peer id.")
def keygen(call: Invocation, file: Path, identity: bool) -> None:
    """Make the key of a private swarm, and write it to FILE.

    Whoever has the file can join with --swarm-key FILE, and nobody else can. Give it to members only.

    With --identity, FILE is for generate --identity FILE, and nobody else's. Its peer id, which is printed,
    is what operators put on their lists. If FILE has one already, it stays.
    """
    call.settings()  # ends the command before it makes anything, if that was only asked for
    if identity:
        _name_client(call, file)
        return
    from p2pinfer.node.transport.swarm_key import make_swarm_key

    make_swarm_key(file)
    if call.json:
        write_out(json.dumps({"swarm_key": str(file)}) + "\n")
    elif not call.quiet:
        note(f"wrote {file}; every node and client of the swarm takes --swarm-key {file}")


def _name_client(call: Invocation, file: Path) -> None:
    from p2pinfer.node.transport.identity import client_identity

    peer_id = client_identity(file).peer_id
    write_out(json.dumps({"identity": str(file), "peer_id": peer_id}) + "\n" if call.json else f"{peer_id}\n")
    if not (call.json or call.quiet):
        note(
            f"operators add that to a list, as by --allow clients:{peer_id}; you take --identity {file}, and "
            "every node that you use can tell that it is you again"
        )
