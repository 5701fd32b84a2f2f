"""Log probabilities: the model's own, whatever is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from p2pinfer.models.text.log_probabilities import log_probabilities


def test_they_are_those_of_the_softmax_and_the_likeliest_come_first() -> None:
    logits = torch.tensor([math.log(1.0), math.log(4.0), math.log(3.0)])
    found = log_probabilities(logits, 0, 2)
    assert found.token == pytest.approx(math.log(1 / 8))
    assert [token_id for token_id, _ in found.likeliest] == [1, 2]
    assert [value for _, value in found.likeliest] == pytest.approx([math.log(1 / 2), math.log(3 / 8)])


@pytest.mark.parametrize(("count", "given"), [(0, 0), (5, 3)])
def test_there_are_no_more_than_the_vocabulary_has(count: int, given: int) -> None:
    assert len(log_probabilities(torch.zeros(3, dtype=torch.bfloat16), 1, count).likeliest) == given
