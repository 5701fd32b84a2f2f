import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pinfer.errors import CacheFull
from p2pinfer.node.protocol.replay_log import ReplayBudget, ReplayGap, ReplayLog


class LogAgainstList(RuleBasedStateMachine):
    """The log against a plain list of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = ReplayBudget(1000)
        self.log = ReplayLog(self.budget, 60)
        self.rows: list[bytes] = []
        self.given_up = False
        self.stamp = 0

    @rule(back=st.integers(0, 5), tokens=st.integers(1, 4))
    def send(self, back: int, tokens: int) -> None:
        position = max(0, len(self.rows) - back)
        self.stamp += 1
        rows = [bytes([self.stamp % 256, row]) for row in range(tokens)]
        self.log.append(position, tokens, b"".join(rows))
        self.rows[position:] = rows
        self.given_up = (self.given_up and position > 0) or len(self.rows) > 30

    @rule()
    def begin_anew(self) -> None:
        self.log.append(0, 1, b"x0")
        self.rows = [b"x0"]
        self.given_up = False

    @precondition(lambda self: bool(self.rows))
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.rows)))
        self.log.truncate(position)
        del self.rows[position:]

    @precondition(lambda self: not self.given_up)
    @rule(data=st.data(), tokens=st.integers(1, 7))
    def read(self, data: st.DataObject, tokens: int) -> None:
        start = data.draw(st.integers(0, len(self.rows)))
        stop = data.draw(st.integers(start, len(self.rows)))
        pieces = list(self.log.chunks(start, stop, tokens))
        assert b"".join(piece.payload for piece in pieces) == b"".join(self.rows[start:stop])
        assert [piece.position for piece in pieces] == list(range(start, stop, tokens))
        assert all(0 < piece.tokens <= tokens and len(piece.payload) == 2 * piece.tokens for piece in pieces)
        with pytest.raises(ReplayGap):
            self.log.chunks(start, len(self.rows) + 1, tokens)

    @invariant()
    def holds_the_same_rows_or_nothing(self) -> None:
        if self.given_up:
            assert self.log.entries() == ()
            with pytest.raises(ReplayGap):
                self.log.chunks(0, 1, 1)
            return
        entries = self.log.entries()
        assert b"".join(entry.payload for entry in entries) == b"".join(self.rows)
        assert self.log.tokens == len(self.rows)
        ends = [entry.position + entry.tokens for entry in entries]
        assert [entry.position for entry in entries] == [0, *ends[:-1]][: len(entries)]

    def teardown(self) -> None:
        self.log.release()
        self.log.release()
        assert self.budget.reserved_bytes == 0


TestLogAgainstList = LogAgainstList.TestCase


def test_a_log_that_does_not_fit_the_budget_is_refused_and_takes_nothing() -> None:
    budget = ReplayBudget(1000)
    ReplayLog(budget, 700)
    with pytest.raises(CacheFull, match="replay log full"):
        ReplayLog(budget, 301)
    ReplayLog(budget, 300)
    assert budget.reserved_bytes == 1000
