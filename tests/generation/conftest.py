"""What tests of generations share: the bundled model's embedding, head and tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

from ..node.memory_swarm import FLOAT32


@pytest.fixture(scope="module")
def ends(checkpoint: Checkpoint) -> EmbeddingAndHead:
    return load_embedding_and_head(checkpoint, FLOAT32)


@pytest.fixture
def tokenizer(tiny_stories: Path) -> Tokenizer:
    return load_tokenizer(tiny_stories)
