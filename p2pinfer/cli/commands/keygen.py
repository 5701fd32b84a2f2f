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
@click.option("--identity", is_flag=True, help="Create a client identity instead, and print its peer id.")
def keygen(call: Invocation, file: Path, identity: bool) -> None:
    """Create the key of a private swarm and write it to FILE.

    Anybody who has the file can join with --swarm-key FILE; nobody else can. Give it only to members.

    With --identity, create a permanent client identity, for generate --identity FILE. Keep that file secret.
    Operators put the printed peer id on their lists. An identity that FILE already holds is kept.
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
        note(f"wrote {file}; start every node and client of the swarm with --swarm-key {file}")


def _name_client(call: Invocation, file: Path) -> None:
    from p2pinfer.node.transport.identity import client_identity

    peer_id = client_identity(file).peer_id
    write_out(json.dumps({"identity": str(file), "peer_id": peer_id}) + "\n" if call.json else f"{peer_id}\n")
    if not (call.json or call.quiet):
        note(
            f"operators can admit this client by --allow clients:{peer_id}; use it with --identity {file}. "
            "Every node that you use can recognise this peer id"
        )
