from __future__ import annotations

import torch

from .clear import clear_choices


def logits(*leads: float) -> torch.Tensor:
    """One token a row: the first candidate leads by so much, all others are far behind."""
    rows = torch.full((len(leads), 30), -50.0)
    rows[:, 0] = 1.0
    rows[:, 1] = 1.0 - torch.tensor(leads)
    return rows


def test_a_lead_is_clear_if_it_is_more_than_twice_what_rounding_took_from_any() -> None:
    exact, rounded = logits(1.0, 0.3, 0.1), logits(0.8, 0.3, 0.1)
    assert clear_choices(exact, rounded).mask.tolist() == [True, False, False]
    assert clear_choices(exact, exact).mask.tolist() == [True, True, True]


def test_what_moves_all_logits_alike_takes_no_lead() -> None:
    exact = logits(0.01)
    assert clear_choices(exact, exact + 3).mask.tolist() == [True]
    assert clear_choices(exact, exact).ids.tolist() == [0]
