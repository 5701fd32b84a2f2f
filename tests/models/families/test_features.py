"""What sets the families apart, in training, in audits and on its way from the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as files
from torch import Tensor

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import Microbatch, SpanPasses, complete
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.reference import open_reference
from p2pinfer.models.verify.verify import measure_span

from .parity import write_model
from .samples import SAMPLES, Config

SPAN = BlockSpan(0, 4)
TOKENS = 40
# Between them they have every feature: norms, parallel blocks, joined products, experts, ALiBi, sinks, ropes.
TRAINED = {
    "bloom": {},
    "cohere": {"use_qk_norm": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3_text": {},
    "glm4": {},
    "gpt_oss": {},
    "granite": {},
    "olmo2": {},
    "qwen2_moe": {},
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Checkpoint]:
    """`make(family, changes)`: a tiny checkpoint of random weights."""

    def made(family: str, changes: Config | None = None) -> Checkpoint:
        write_model(tmp_path, family, {**SAMPLES[family].config, **(changes or {})}, prompts=0)
        return open_checkpoint(tmp_path, family)

    return made


def runner_of(checkpoint: Checkpoint, dtype: str = "float32") -> SpanRunner:
    return open_runner(
        checkpoint, SPAN, ComputeConfig(device="cpu", dtype=dtype, threads=1, cache_bytes=1 << 21)
    )


def run(runner: SpanRunner, hidden: Tensor) -> Tensor:
    lease = runner.cache.reserve(len(hidden))
    try:
        return runner.run([Chunk(lease, 0, hidden)])[0].float()
    finally:
        lease.release()


@pytest.mark.parametrize("family", TRAINED)
def test_passes_of_training_give_the_output_and_its_slope(
    family: str, make: Callable[..., Checkpoint]
) -> None:
    """The slope along a random direction, by differences of what serving computes."""
    runner = runner_of(make(family, TRAINED[family]))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, runner.spec.hidden_size, generator=generator)
    direction = torch.randn(hidden.shape, generator=generator) / 64
    of_output = torch.randn(hidden.shape, generator=generator)
    at = torch.arange(TOKENS)
    batch = Microbatch(SPAN, Rows([TOKENS], at, at))
    passes = SpanPasses(*runner.parts)
    forwarded = complete(passes.forward(batch, hidden))
    torch.testing.assert_close(forwarded.output, run(runner, hidden), atol=1e-4, rtol=1e-4)
    gradient = complete(passes.backward(batch, forwarded.inputs, of_output)).hidden
    assert gradient is not None
    step = 0.02
    ahead, behind = run(runner, hidden + step * direction), run(runner, hidden - step * direction)
    slope = float(((ahead - behind) * of_output).sum()) / (2 * step)
    # A swap of experts on the way would be a jump; the seeds are of steps without one.
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.05)


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "gemma3_text"])
def test_an_audit_tells_rounding_from_other_weights(family: str, make: Callable[..., Checkpoint]) -> None:
    checkpoint = make(family)
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="bfloat16", threads=1))
    inputs = ends.embed([(29 * index) % 89 + 3 for index in range(TOKENS)])
    reference = open_reference(checkpoint, SPAN, max_tokens=64)
    honest = run(runner_of(checkpoint, "bfloat16"), inputs)
    liar = honest * 1.1

    def upper(outputs: Tensor) -> float:
        found = measure_span(reference, SPAN, inputs, outputs, wire_dtype=torch.bfloat16)
        return max(chunk.upper_rho for chunk in found.chunks)

    assert upper(honest) < 2.5 < 5 < upper(liar)


def test_experts_in_mxfp4_are_those_that_transformers_unpacks(make: Callable[..., Checkpoint]) -> None:
    from transformers.integrations import mxfp4

    folder = make("gpt_oss", {"intermediate_size": 64}).folder
    library: Any = files
    tensors: dict[str, Tensor] = library.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    packed: dict[str, Tensor] = {}
    for name in [each for each in tensors if each.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, rows = tensors[name].shape
        blocks = torch.randint(
            0, 256, (count, rows, inputs // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(120, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacker: Any = mxfp4
        tensors[name] = unpacker.convert_moe_packed_tensors(blocks, scales).float().contiguous()
    config = json.loads((folder / "config.json").read_text())
    outputs: list[Tensor] = []
    hidden = torch.randn(9, 64, generator=generator)
    quantised = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in packed} | packed
    for stored, extra in ((tensors, {}), (quantised, {"quantization_config": {"quant_method": "mxfp4"}})):
        library.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | extra))
        outputs.append(run(runner_of(open_checkpoint(folder, "m")), hidden))
    assert torch.equal(*outputs)


def test_blooms_tensors_may_lack_the_prefix(make: Callable[..., Checkpoint]) -> None:
    checkpoint = make("bloom")
    hidden = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    expected = run(runner_of(checkpoint), hidden)
    library: Any = files
    path = checkpoint.folder / "model.safetensors"
    tensors: dict[str, Tensor] = library.load_file(path)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    library.save_file(bare, path, metadata={"format": "pt"})
    again = open_checkpoint(checkpoint.folder, "bloom")
    assert torch.equal(run(runner_of(again), hidden), expected)
    load_embedding_and_head(again, ComputeConfig(device="cpu", dtype="float32", threads=1))


def test_a_bias_that_a_family_has_not_is_refused(make: Callable[..., Checkpoint]) -> None:
    checkpoint = make("starcoder2", {"use_bias": True})
    config = json.loads((checkpoint.folder / "config.json").read_text())
    (checkpoint.folder / "config.json").write_text(json.dumps({**config, "use_bias": False}))
    with pytest.raises(CheckpointError, match="does not use"):
        runner_of(open_checkpoint(checkpoint.folder, "m"))
