"""What was exported comes in whole; what was made up does not come in at all."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import LocalError
from p2pinfer.reputation import exchange
from p2pinfer.reputation.exchange import export_ledger, import_ledger
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Verdict

from .support import audit


def lived_in() -> Ledger:
    ledger = Ledger(vouched=["mine"])
    audit(ledger, "good", Verdict.PASS, 20, now=5.0)
    ledger.record_failure("good", 6.0, "vanished")
    audit(ledger, "bad", Verdict.FAIL, now=7.0)
    return ledger


def test_an_export_comes_in_whole_and_twice_is_once(tmp_path: Path) -> None:
    exported = export_ledger(lived_in())
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    assert import_ledger(ledger, exported, 100.0) == 3
    ledger.close()
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    assert ledger.peers() == lived_in().peers()
    import_ledger(ledger, exported, 100.0)
    assert ledger.peers() == lived_in().peers()
    ledger.close()


def test_it_is_merged_and_overwrites_nothing() -> None:
    ledger = Ledger()
    audit(ledger, "good", Verdict.PASS, 30, now=50.0)
    ledger.forgive("bad", 60.0)
    import_ledger(ledger, export_ledger(lived_in()), 100.0)
    assert ledger.account("good").passed == 30
    assert ledger.account("good").failures == 1
    assert not ledger.is_banned("bad")


@pytest.mark.parametrize(
    "exported",
    [
        b"",
        b"[]",
        b"{}",
        b'{"p2pinfer_ledger": 2, "peers": {}}',
        b'{"p2pinfer_ledger": 1, "peers": {"two words": {}}}',
        b'{"p2pinfer_ledger": 1, "peers": {"good": {}, "bad": {"alpha": -1}}}',
        b'{"p2pinfer_ledger": 1, "peers": {"a": {"stranger": 1}}}',
        b'{"p2pinfer_ledger": 1, "peers": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b"\xff\xfe",
    ],
)
def test_what_is_no_export_changes_nothing(exported: bytes) -> None:
    ledger = Ledger()
    with pytest.raises(LocalError, match="not an exported ledger"):
        import_ledger(ledger, exported, 1.0)
    assert ledger.peers() == {}


def test_an_export_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_EXPORT_BYTES", 10)
    with pytest.raises(LocalError, match="10 are allowed"):
        import_ledger(Ledger(), b" " * 11, 1.0)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_random_bytes_are_a_clear_error(exported: bytes) -> None:
    with pytest.raises(LocalError):
        import_ledger(Ledger(), exported, 1.0)
