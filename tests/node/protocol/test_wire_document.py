"""docs/wire.md names every field that travels, in the order in which it does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import msgspec
import pytest

from p2pinfer.node.evidence import store
from p2pinfer.node.protocol import draws, frames, messages, train_messages, train_stream, train_tensors
from p2pinfer.node.reach import dialback
from p2pinfer.node.swarm import identity_check, proof_gossip, signed_records, snapshot
from p2pinfer.node.training import offered_adapters
from p2pinfer.node.weights import messages as weights_messages
from p2pinfer.reputation import proof, receipt, train_receipt
from p2pinfer.routing import announcement

DOCUMENT = (Path(__file__).parents[3] / "docs" / "wire.md").read_text(encoding="utf-8")
# Where the document has a struct's fields: a row of the messages' table, a bracketed list, or a table of its
# own (the how-manieth of a section). A struct that is nowhere here fails the first test.
MESSAGES = (
    *("Open", "Opened", "Move", "Moved", "Attach", "Attached", "Step", "Filled", "Result", "Refused"),
    *("Expect", "Relink", "Relinked", "Probe", "Alive", "Leaving", "End"),
)
TRAIN_MESSAGES = (
    *("Begin", "Begun", "Adapt", "Adapted", "Forward", "Forwarded", "Backward", "Backwarded"),
    *("Forget", "Declined", "Done"),
)
WEIGHTS_MESSAGES = (
    *("Find", "Found", "Chunks", "Listed", "Get", "Small", "Sending", "Knock", "Door", "Denied"),
)
LISTS = {
    "Weight": "weights",
    "Words": "texts",
    "Successor": "successor",
    "Prefix": "prefix",
    "Bill": "bills",
    "Update": "updates",
    "AdapterHead": "digest",
    "CallHead": "call",
    "Draw": "draw",
    "Draws": "draws",
    "Log": "log",
    "_Offer": "adapters",
    "AdapterDescription": "description",
}
TABLES = {
    "_Wire": ("Announcements", 0),
    "_Sealed": ("Sealed records", 0),
    "_Request": ("Snapshots", 0),
    "_Entry": ("Snapshots", 1),
    "Receipt": ("Session and chain frames", 0),
    "TrainReceipt": ("Training", 0),
    "_Ports": ("Dial-back", 0),
    "_Seen": ("Dial-back", 1),
    "LivenessProof": ("Twins", 0),
    "_Ask": ("Evidence", 0),
    "_Answer": ("Evidence", 1),
    "Proof": ("Fraud proofs", 0),
    "Notice": ("Fraud proofs", 1),
}


def structs(module: ModuleType) -> Iterator[type[msgspec.Struct]]:
    """The structs that `module` defines and sends; not those that are only derived from."""
    for value in vars(module).values():
        is_struct = isinstance(value, type) and issubclass(value, msgspec.Struct)
        if is_struct and value.__module__ == module.__name__ and not value.__subclasses__():
            yield value


MODULES = (
    messages,
    draws,
    train_messages,
    train_tensors,
    train_receipt,
    snapshot,
    dialback,
    identity_check,
    signed_records,
    announcement,
    receipt,
    store,
    offered_adapters,
    proof,
    proof_gossip,
    weights_messages,
)
STRUCTS = [struct for module in MODULES for struct in structs(module)]


def section(title: str) -> str:
    return DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def documented(name: str) -> tuple[str, ...]:
    """The fields that the document gives a struct."""
    if name in MESSAGES or name in TRAIN_MESSAGES:
        table = section("Session and chain frames" if name in MESSAGES else "Training")
        [row] = re.findall(rf"^\| `{name.lower()}` \| ([^|]*)\|", table, re.MULTILINE)
        return tuple(field.split()[0] for field in row.split(",") if field.strip())
    if name in WEIGHTS_MESSAGES:
        [row] = re.findall(rf"^\| `{name.lower()}` \| ([^|]*)\|", section("Weights"), re.MULTILINE)
        return tuple(field.split()[0] for field in row.split(",") if field.strip())
    if name in LISTS:
        [fields] = re.findall(rf"^- \*{LISTS[name]}\*: `\[([^]]*)\]`", DOCUMENT, re.MULTILINE)
        return tuple(fields.split(", "))
    title, number = TABLES[name]
    table = section(title).split("| field | type | what it says |\n")[1:][number].partition("\n\n")[0]
    return tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_every_struct_has_its_place_in_the_document() -> None:
    assert {struct.__name__ for struct in STRUCTS} == {
        *(*MESSAGES, *TRAIN_MESSAGES, *WEIGHTS_MESSAGES),
        *(*LISTS, *TABLES),
    }


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_the_document_names_every_field_in_order(struct: type[msgspec.Struct]) -> None:
    assert documented(struct.__name__) == struct.__struct_fields__


def test_the_document_names_every_refusal_code() -> None:
    listed = DOCUMENT.partition("Refusal codes:")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == get_args(messages.RefusalCode)
    listed = DOCUMENT.partition("Codes of `denied`:")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == get_args(weights_messages.DenialCode)
    listed = DOCUMENT.partition("Codes of `declined`:")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == get_args(train_messages.DeclineCode)


def test_the_document_has_the_protocols_and_the_bounds() -> None:
    for protocol in (
        messages.SESSION_PROTOCOL,
        messages.CHAIN_PROTOCOL,
        train_messages.TRAIN_PROTOCOL,
        snapshot.SNAPSHOT_PROTOCOL,
        dialback.DIALBACK_PROTOCOL,
        identity_check.TWIN_PROTOCOL,
        store.EVIDENCE_PROTOCOL,
    ):
        assert f"| `{protocol}` |" in DOCUMENT
    for title, bounds in {
        "Session and chain frames": [
            frames.MAX_HEADER_BYTES,
            receipt.MAX_RECEIPT_BYTES,
            draws.MAX_RULES_BYTES,
            draws.MAX_LOGS,
        ],
        "Training": [
            train_stream.MAX_TRAIN_HEADER_BYTES,
            train_messages.MAX_UPDATES,
            train_messages.MAX_SEQUENCES,
        ],
        "Dial-back": [dialback.MAX_PORTS, dialback.MAX_BYTES],
        "Evidence": [store.MAX_DIGESTS, store.MAX_CONTENT_BYTES],
        "Fraud proofs": [
            proof.MAX_PROOF_BYTES,
            proof.MAX_RECEIPTS,
            proof_gossip.MAX_NOTICE_BYTES,
            proof_gossip.MAX_TENSOR_BYTES,
            proof_gossip.MAX_BYTES,
            proof_gossip.BYTES_PER_S,
            proof_gossip.BYTES_AT_ONCE,
            proof_gossip.AUTHORS_BYTES_PER_S,
        ],
        "Announcements": [
            announcement.MAX_ANNOUNCEMENT_BYTES,
            announcement.MAX_BLOCKS,
            announcement.MAX_ADDRS,
            int(announcement.MIN_TTL_S),
            int(announcement.MAX_TTL_S),
        ],
        "Sealed records": [signed_records.MAX_RECORD_BYTES],
        "Snapshots": [
            snapshot.MAX_REQUEST_BYTES,
            snapshot.TAG_BYTES,
            snapshot.MAX_TAGS,
            snapshot.MAX_RESPONSE_BYTES,
            snapshot.MAX_RECORDS,
            signed_records.MAX_RECORD_BYTES,
        ],
    }.items():
        numbers = re.findall(r"[\d,]*\d", section(title))
        assert {f"{bound:,}" for bound in bounds} <= set(numbers)


def test_the_document_says_what_a_signature_covers() -> None:
    for title, domain in {
        "Sealed records": vars(signed_records)["_DOMAIN"],
        "Session and chain frames": receipt.DOMAIN,
        "Training": train_receipt.TRAIN_DOMAIN,
    }.items():
        text, zero = domain[:-1].decode(), domain[-1:]
        assert f"`{text}`, one zero byte" in section(title)
        assert zero == b"\0"
