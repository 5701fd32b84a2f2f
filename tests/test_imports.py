"""What a process that computes does without: idle, its memory is torch, libp2p, the weights and the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path

import p2pinfer.client
import p2pinfer.node.node
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer

span = BlockSpan(0, 8)
config = ComputeConfig(cache_bytes=1 << 20)
checkpoint = resolve_model(BUNDLED_MODEL, cache_dir=Path(sys.argv[1])).fetch(span, embedding_and_head=True)
runner, ends = open_runner(checkpoint, span, config), load_embedding_and_head(checkpoint, config)
ids = load_tokenizer(checkpoint.folder).encode("Once upon a time")
hidden = runner.run([Chunk(runner.cache.reserve(len(ids)), 0, ends.embed(ids))])
ends.logits(hidden[0])
print(*sorted({"huggingface_hub", "sympy", "torch._dynamo", "transformers"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_a_node_and_a_client_generate_without_transformers(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-c", CODE, tmp_path], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
