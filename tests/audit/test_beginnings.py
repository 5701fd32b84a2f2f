"""The part of a session that a glance looks at: a beginning, drawn so that a lie has no good place."""

from __future__ import annotations

import random

import pytest
import torch

from p2pinfer.audit.local_verifier import GLANCED_TOKENS, draw_beginning
from p2pinfer.node.evidence.hop_record import History


def session(tokens: int, prompt: int = 0) -> History:
    """A session whose outputs are those from the end of a prompt on, which were all returned for 0."""
    rows = torch.arange(tokens, dtype=torch.float32)[:, None]
    positions = tuple(range(max(prompt - 1, 0), tokens))
    return History(rows, rows[list(positions)], positions)


@pytest.mark.parametrize(("tokens", "prompt"), [(9, 0), (16, 0), (40, 0), (40, 12), (200, 150), (200, 0)])
def test_a_beginning_has_the_outputs_of_its_positions_and_enough_of_them(tokens: int, prompt: int) -> None:
    whole, rng = session(tokens, prompt), random.Random(0)
    for _ in range(50):
        part = draw_beginning(whole, rng)
        assert len(part.outputs) == len(part.positions) >= min(GLANCED_TOKENS, len(whole.positions))
        assert part.inputs.flatten().tolist() == list(range(len(part.inputs)))
        assert part.outputs.flatten().tolist() == list(part.positions)
        assert part.positions[-1] == len(part.inputs) - 1


def test_no_place_for_a_lie_spoils_more_tokens_until_a_glance_meets_it() -> None:
    """Found in a share of the glances as large as the part of the session that it spoils, or larger."""
    whole, rng = session(400), random.Random(1)
    ends = [len(draw_beginning(whole, rng).inputs) for _ in range(4000)]
    for start in (0, 100, 200, 300, 380):
        met = sum(end > start for end in ends) / len(ends)
        assert met >= (400 - start) / 400 - 0.03
    assert sum(ends) / len(ends) == pytest.approx(208, rel=0.03)  # what they cost
