"""Outputs of which some were rounded to be packed, and what can be told of them."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from p2pinfer.models.packed_rows import nearest_unpacked, rounded_rows, steps_of


def packed_mask(packed: Set[int], positions: Sequence[int]) -> Tensor | None:
    """(positions,) bool, True at those that are packed; None if none of them is."""
    mask = torch.tensor([position in packed for position in positions])
    return mask if mask.any() else None


def rounded_where(rows: Tensor, packed: Tensor) -> Tensor:
    """`rows`, (n, hidden_size) float32, of which those that are marked are rounded as if to be packed."""
    rows = rows.clone()
    rows[packed] = rounded_rows(rows[packed])
    return rows


def unpacked_towards(exact: Tensor, rows: Tensor, packed: Tensor | None) -> Tensor:
    """`rows`, of which those that are marked are moved as near to `exact` as their packing allows.

    Args:
        exact: (n, hidden_size) float32, as `rows` are.
        packed: (n,) bool; None: none of them.
    """
    if packed is None or not packed.any():
        return rows
    rows = rows.clone()
    rows[packed] = nearest_unpacked(exact[packed], rows[packed])
    return rows


def difference(one: Tensor, other: Tensor, packed: Tensor | None) -> Tensor:
    """`one` less `other`, of which rows that are marked differ by no more than both have if they were packed.

    Args:
        one: (n, hidden_size) float32, as `other` is.
        packed: (n,) bool, where one of them was packed; None: nowhere.
    """
    if packed is None:
        return one - other
    one, other = rounded_where(one, packed), rounded_where(other, packed)
    apart = one - other
    room = (steps_of(one) + steps_of(other)) / 2 * packed[:, None]
    return torch.sign(apart) * (apart.abs() - room).clamp_min(0.0)
