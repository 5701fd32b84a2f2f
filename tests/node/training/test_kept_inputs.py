"""Inputs and graphs of forward passes are kept within so many bytes, and whoever has most makes room."""

from __future__ import annotations

import torch

from p2pinfer.models.learning.adapter import NO_ADAPTER
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import BlockGraph
from p2pinfer.node.training.kept_inputs import Inputs, KeptInputs

ORDER = torch.arange(4)
ROWS = Rows([4], ORDER, ORDER)


def inputs(*graphs: int) -> Inputs:
    """800 bytes, and graphs of these sizes."""
    tensor = torch.zeros(4, 50)
    made = {block: BlockGraph(tensor, NO_ADAPTER, tensor, size) for block, size in enumerate(graphs)}
    return Inputs(ROWS, (tensor,), b"digest", graphs=made)


def test_graphs_count_as_what_they_took_until_the_pass_is_dropped() -> None:
    kept = KeptInputs(10_000)
    first = inputs(3000, 200)
    kept.add("session", 1, "client", first)
    assert kept.held_bytes == 4000
    first.graphs.clear()  # a backward pass has used them
    kept.add("session", 2, "client", inputs())
    assert kept.held_bytes == 4800
    kept.drop("session", 1)
    assert kept.held_bytes == 800
    kept.drop_all("session")
    assert kept.held_bytes == 0


def test_another_graph_takes_half_of_what_is_left() -> None:
    kept = KeptInputs(10_000)
    assert kept.graph_bytes == 5000
    kept.add("session", 1, "client", inputs(3200))
    assert kept.graph_bytes == 3000


def test_a_pass_whose_graphs_do_not_fit_keeps_its_inputs() -> None:
    kept = KeptInputs(1000)
    kept.add("session", 1, "client", inputs(5000))
    found = kept.get("session", 1)
    assert found is not None
    assert not found.graphs
    assert kept.held_bytes == 800


def test_who_has_most_makes_room() -> None:
    kept = KeptInputs(5000)
    kept.add("greedy", 1, "a", inputs(1000))
    kept.add("greedy", 2, "a", inputs(1000))
    kept.add("modest", 1, "b", inputs())
    kept.add("modest", 2, "b", inputs())
    assert kept.get("greedy", 1) is None
    assert kept.get("greedy", 2) is not None
    assert kept.get("modest", 1) is not None
