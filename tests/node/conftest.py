"""What tests of nodes share: the model they serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.models.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tiny_stories: Path) -> Checkpoint:
    """The bundled model's."""
    return open_checkpoint(tiny_stories, "tiny-stories")
