"""`p2pinfer reputation`: scores of peers, and the user's own bans and pardons."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pinfer.cli.completing import complete_peers
from p2pinfer.cli.invocation import DATA_DIR, Invocation, command, group
from p2pinfer.cli.output.plain import ascii_json, one_line, printable, short_peer
from p2pinfer.cli.output.terminal import note, print_out, read_stdin, write_out
from p2pinfer.errors import ConfigError, LocalError

if TYPE_CHECKING:
    from p2pinfer.reputation.ledger import Ledger

_PEER_ID = re.compile(r"\A[1-9A-HJ-NP-Za-km-z]{46,60}\Z")  # base58 of an Ed25519 key's peer id
_LEAST_ENDING = 4  # characters of a peer id that may stand for it


@group(
    "reputation",
    examples=[
        "p2pinfer reputation",
        "p2pinfer reputation show vwxyz1",
        "p2pinfer reputation ban 12D3KooW... --why 'sent nonsense'",
        "p2pinfer reputation export > ledger.json",
    ],
)
@DATA_DIR
def reputation(call: Invocation) -> None:
    """List known peers with their scores, audits and bans.

    PEER is a peer id, or the last four or more characters of one.
    """
    _list(call)


def _list(call: Invocation) -> None:
    with _ledger(call) as ledger:
        if call.json:
            write_out(json.dumps({"peers": [_to_dict(ledger, each) for each in _ranked(ledger)]}) + "\n")
        elif ledger.peers():
            _print_table(ledger)
        else:
            note("no peers are known yet")


def _below(made: click.Command) -> click.Command:
    """Put a command below `reputation`."""
    reputation.add_command(made)
    return made


@_below
@command("list", examples=["p2pinfer reputation list --json"])
@DATA_DIR
def list_(call: Invocation) -> None:
    """List known peers, as `p2pinfer reputation` alone does."""
    _list(call)


@_below
@command("show", examples=["p2pinfer reputation show vwxyz1"])
@click.argument("peer", shell_complete=complete_peers)
@DATA_DIR
def show(call: Invocation, peer: str) -> None:
    """Explain the scores of PEER."""
    with _ledger(call) as ledger:
        peer_id = _find(ledger, peer, may_be_new=True)
        if call.json:
            told = {**_to_dict(ledger, peer_id), "why": ledger.explain(peer_id)}
            write_out(json.dumps(told) + "\n")
        else:
            write_out("\n".join([peer_id, *(printable(line) for line in ledger.explain(peer_id))]) + "\n")


@_below
@command("ban", examples=["p2pinfer reputation ban vwxyz1 --why 'sent nonsense'"])
@click.argument("peer", shell_complete=complete_peers)
@click.option("--why", default="by the user", metavar="TEXT", help="Reason, stored with the ban.")
@DATA_DIR
def ban(call: Invocation, peer: str, why: str) -> None:
    """Ban PEER: never use it again."""
    with _ledger(call) as ledger:
        peer_id = _find(ledger, peer, may_be_new=True)
        ledger.ban(peer_id, why, time.time())
    _say(call, f"{peer_id} is banned", peer_id)


@_below
@command("forgive", examples=["p2pinfer reputation forgive vwxyz1"])
@click.argument("peer", shell_complete=complete_peers)
@DATA_DIR
def forgive(call: Invocation, peer: str) -> None:
    """Reset PEER to a newcomer, without ban or evidence."""
    with _ledger(call) as ledger:
        peer_id = _find(ledger, peer)
        ledger.forgive(peer_id, time.time())
    _say(call, f"{peer_id} is a newcomer again", peer_id)


@_below
@command("vouch", examples=["p2pinfer reputation vouch 12D3KooW..."])
@click.argument("peer", shell_complete=complete_peers)
@DATA_DIR
def vouch(call: Invocation, peer: str) -> None:
    """Trust the integrity of PEER without audits, for example of your own computer."""
    with _ledger(call) as ledger:
        peer_id = _find(ledger, peer, may_be_new=True)
        ledger.vouch(peer_id, time.time())
    _say(call, f"{peer_id} is vouched for", peer_id)


@_below
@command("export", examples=["p2pinfer reputation export > ledger.json"])
@DATA_DIR
def export(call: Invocation) -> None:
    """Write the ledger of all peers to standard output as JSON."""
    from p2pinfer.reputation.exchange import export_ledger

    with _ledger(call) as ledger:
        write_out(ascii_json(export_ledger(ledger).decode()))


@_below
@command("import", examples=["p2pinfer reputation import ledger.json"])
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@DATA_DIR
def import_(call: Invocation, file: Path) -> None:
    """Merge an exported ledger FILE into this one; - is standard input.

    Its bans and audits count as your own, so import only ledgers of your own machines.
    """
    from p2pinfer.reputation.exchange import import_ledger

    exported = _read(file)
    with _ledger(call) as ledger:
        count = import_ledger(ledger, exported, time.time())
    if call.json:
        write_out(json.dumps({"imported": count}) + "\n")
    elif not call.quiet:
        note(f"{count} peers imported")


@contextmanager
def _ledger(call: Invocation) -> Generator[Ledger]:
    """The data directory's ledger, written when the block ends.

    Raises:
        LocalError: It cannot be opened or written.
    """
    from p2pinfer.config import SharedConfig
    from p2pinfer.reputation.ledger import Ledger
    from p2pinfer.reputation.store import FILE_NAME

    data_dir = call.settings().build(SharedConfig).data_dir
    ledger = Ledger.open(data_dir / FILE_NAME)
    ledger.advance(time.time())
    try:
        yield ledger
    finally:
        ledger.close()


def _find(ledger: Ledger, peer: str, *, may_be_new: bool = False) -> str:
    """The peer id that `peer` is, or ends.

    Raises:
        ConfigError: It is neither, or the end of several.
    """
    known = ledger.peers()
    if peer in known or (may_be_new and _PEER_ID.match(peer)):
        return peer
    if len(peer) >= _LEAST_ENDING:
        found = [peer_id for peer_id in known if peer_id.endswith(peer)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{len(found)} peer ids end with {peer}; give more characters")
    missing = "is neither a peer id nor the end of a known one" if may_be_new else "is not known"
    raise ConfigError(f"{one_line(peer, 80)} {missing}; `p2pinfer reputation` lists known peers")


def _read(file: Path) -> bytes:
    try:
        return read_stdin() if str(file) == "-" else file.read_bytes()
    except OSError as exc:
        raise LocalError(f"cannot read {file}: {exc.strerror or exc}") from exc


def _ranked(ledger: Ledger) -> list[str]:
    """Everybody, the best believed first and the banned last."""

    def rank(peer_id: str) -> tuple[bool, float, float, str]:
        score = ledger.score(peer_id)
        return (ledger.is_banned(peer_id), -score.integrity, -score.reliability, peer_id)

    return sorted(ledger.peers(), key=rank)


def _to_dict(ledger: Ledger, peer_id: str) -> dict[str, object]:
    """A peer as `--json` prints it."""
    from p2pinfer.reputation.explain import standing

    score, account = ledger.score(peer_id), ledger.account(peer_id)
    return {
        "peer_id": peer_id,
        "standing": standing(account, ledger.config),
        "banned": ledger.is_banned(peer_id),
        "integrity": score.integrity,
        "reliability": score.reliability,
        "audits": {
            "passed": account.passed,
            "failed": account.failed,
            "suspect": account.suspected,
            "inconclusive": account.inconclusive,
            "withheld": account.withheld,
        },
        "sessions": {"done": account.sessions - account.failures, "failed": account.failures},
        "first_seen": account.first_seen,
        "last_seen": account.last_seen,
        "ban": None if account.ban is None else {"by": account.ban.by, "why": account.ban.why},
    }


def _print_table(ledger: Ledger) -> None:
    from rich.table import Table
    from rich.text import Text

    from p2pinfer.reputation.explain import standing

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("peer", "standing"):
        table.add_column(heading, no_wrap=True)
    for heading in ("integrity", "audits", "reliability", "sessions", "seen"):
        table.add_column(heading, justify="right", no_wrap=True)
    reasons: list[str] = []
    for peer_id in _ranked(ledger):
        score, account = ledger.score(peer_id), ledger.account(peer_id)
        table.add_row(
            Text(short_peer(peer_id)),
            Text(standing(account, ledger.config)),
            f"{score.integrity:.2f}",
            f"{account.passed}/{account.audits}",
            f"{score.reliability:.2f}",
            f"{account.sessions - account.failures}/{account.sessions}",
            _age(time.time() - account.last_seen) if account.last_seen else "-",
        )
        reason = account.ban.why if account.ban else account.notes[-1].text if account.notes else ""
        if reason:
            reasons.append(f"{short_peer(peer_id)}  {one_line(reason, 120)}\n")
    print_out(table, whole=True)
    if reasons:
        write_out("\n" + "".join(reasons))


def _age(seconds: float) -> str:
    """Since when, as roughly as people say it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def _say(call: Invocation, text: str, peer_id: str) -> None:
    if call.json:
        write_out(json.dumps({"peer_id": peer_id}) + "\n")
    elif not call.quiet:
        note(text)
