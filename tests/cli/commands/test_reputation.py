"""`p2pinfer reputation`: lists, explains, bans, forgives, and moves to another machine."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.cli.app import run
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Verdict

GOOD = "12D3KooWGoodGoodGoodGoodGoodGoodGoodGoodGoodGoodGoo1"
BAD = "12D3KooWBadBadBadBadBadBadBadBadBadBadBadBadBadBad2"
NEW = "12D3KooWNewNewNewNewNewNewNewNewNewNewNewNewNewNew3"

Ask = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data directory with a ledger that knows a good and a bad peer."""
    folder = tmp_path / "home"
    ledger = Ledger.open(folder / "ledger.sqlite")
    for _ in range(20):
        ledger.record_audit(GOOD, Verdict.PASS, time.time())
        ledger.record_success(GOOD, time.time())
    ledger.record_audit(BAD, Verdict.FAIL, time.time(), why="its logits \x1b[31mdeviate")
    ledger.close()
    return folder


@pytest.fixture
def ask(home: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `p2pinfer reputation ...` and returns what it printed, once it has ended well."""

    def asked(*argv: str, data_dir: Path = home) -> str:
        assert run(["reputation", *argv, "--data-dir", str(data_dir)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return asked


def peers(ask: Ask, **options: Any) -> dict[str, dict[str, Any]]:
    return {each["peer_id"]: each for each in json.loads(ask("--json", **options))["peers"]}


@pytest.mark.parametrize("columns", ["30", "80", "160"])
@pytest.mark.parametrize("command", [(), ("list",)])
def test_people_see_a_table_with_the_best_first(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, columns: str, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    heading, *rows = ask(*command).splitlines()
    assert heading.split() == ["peer", "standing", "integrity", "audits", "reliability", "sessions", "seen"]
    assert rows[0].split() == ["12D3..odGoo1", "audited", "0.87", "20/20", "0.98", "20/20", "now"]
    assert rows[1].split()[:4] == ["12D3..adBad2", "banned", "by", "audits"]
    assert rows[2:] == ["", r"12D3..adBad2  its logits \x1b[31mdeviate"]


def test_how_long_ago_a_peer_was_seen_is_said_roughly(tmp_path: Path, ask: Ask) -> None:
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    for peer_id, seconds in ((GOOD, 600), (BAD, 3 * 3600), (NEW, 40 * 86400)):
        ledger.record_success(peer_id, time.time() - seconds)
    ledger.vouch(NEW[:-1] + "9", 0.0)
    ledger.close()
    seen = {line.split()[0]: " ".join(line.split()[-2:]) for line in ask(data_dir=tmp_path).splitlines()[1:5]}
    assert seen == {
        **{"12D3..odGoo1": "10 min", "12D3..adBad2": "3 h", "12D3..ewNew3": "40 d"},
        "12D3..ewNew9": "0/0 -",
    }


def test_json_has_both_scores_and_the_evidence(ask: Ask) -> None:
    known = peers(ask)
    assert list(known) == [GOOD, BAD]
    good, bad = known[GOOD], known[BAD]
    assert 0.8 < good["integrity"] < 0.9 and 0.9 < good["reliability"] < 1
    assert good["audits"]["passed"] == 20 and good["sessions"] == {"done": 20, "failed": 0}
    assert good["ban"] is None and not good["banned"]
    assert bad["banned"] and bad["ban"]["by"] == "audits" and bad["standing"] == "banned by audits"


def test_an_empty_ledger_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reputation", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "no peers are known yet\n")
    assert run(["reputation", "--json", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == '{"peers": []}\n'


def test_a_peer_is_explained_by_the_end_of_its_id(ask: Ask) -> None:
    said = ask("show", "odGoo1")
    assert said.startswith(GOOD + "\nIt is in good standing.\n")
    assert "with 95% confidence at least 87% of its work is right" in said
    told = json.loads(ask("show", "dBad2", "--json"))
    assert told["peer_id"] == BAD
    assert "because of its audits" in told["why"][0]
    assert "\x1b" not in ask("show", "dBad2")
    assert "Nothing is known of it" in ask("show", NEW)


def test_ban_forgive_and_vouch(ask: Ask) -> None:
    ask("ban", GOOD, "--why", "rude")
    assert peers(ask)[GOOD]["ban"] == {"by": "user", "why": "rude"}
    ask("forgive", "odGoo1", "-q")
    assert peers(ask)[GOOD]["standing"] == "newcomer"
    assert json.loads(ask("vouch", NEW, "--json")) == {"peer_id": NEW}
    known = peers(ask)
    assert known[NEW]["standing"] == "vouched for" and known[NEW]["integrity"] == 1.0
    assert "You vouched for it" in ask("show", NEW)


def test_what_one_machine_exports_another_imports(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = ask("export")
    file, there = tmp_path / "ledger.json", tmp_path / "there"
    file.write_text(exported)
    ask("vouch", NEW, data_dir=there)
    ask("import", str(file), data_dir=there)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(exported.encode())))
    assert json.loads(ask("import", "-", "--json", data_dir=there)) == {"imported": 2}
    known = peers(ask, data_dir=there)
    assert known[NEW]["standing"] == "vouched for"
    here = peers(ask)
    for told in (*known.values(), *here.values()):
        told["reliability"] = round(told["reliability"], 4)  # it ages from one call to the next
    assert {GOOD: known[GOOD], BAD: known[BAD]} == here


@pytest.mark.parametrize(
    ("argv", "exit_code", "complaint"),
    [
        (["show", "xyz"], 2, "xyz is neither a peer id nor the end of a known one"),
        (["forgive", NEW], 2, f"{NEW} is not known"),
        (["ban"], 2, "Missing argument 'PEER'"),
        (["import", "absent.json"], 1, "cannot read absent.json: No such file"),
        (["import", "odd.json"], 1, "not an exported ledger"),
        (["shoe"], 2, "No such command 'shoe'"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], argv: list[str], exit_code: int, complaint: str
) -> None:
    Path("odd.json").write_text("[]")
    assert run(["reputation", "--data-dir", str(home), *argv]) == exit_code
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


def test_an_ending_that_several_share_is_not_enough(ask: Ask, home: Path, capsys: Any) -> None:
    other = GOOD.replace("KooWGood", "KooWGoad")
    ask("ban", other)
    assert run(["reputation", "show", "odGoo1", "--data-dir", str(home)]) == 2
    assert "2 peer ids end with odGoo1; give more characters" in capsys.readouterr().err


def test_a_ledger_that_cannot_be_kept_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(["reputation", "--data-dir", str(tmp_path / "file")]) == 1
    assert "cannot use the ledger" in capsys.readouterr().err


def test_help_lists_what_is_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reputation", "--help"]) == 0
    said = capsys.readouterr().out
    for name in ("show", "ban", "forgive", "vouch", "export", "import"):
        assert f"\n  {name}" in said
    assert run(["reputation", "show", "--help"]) == 0
    assert "Usage: p2pinfer reputation show [OPTIONS] PEER" in capsys.readouterr().out
