"""Published quantised checkpoints: each format against packing by its definition, and whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.checkpoint.published import lay_out, weights_of
from p2pinfer.models.compute.runner import open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.configs.quantization import Published, parse_quantization
from p2pinfer.models.quantised.formats import NF4
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.sessions import run_session

OUTPUTS, INPUTS, GROUP = 24, 64, 32


def codes_of(rows: int, columns: int, most: int = 15) -> Tensor:
    return torch.randint(0, most + 1, (rows, columns), generator=torch.Generator().manual_seed(rows))


def scales_of(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns)).half() * 0.1 + 0.01


def words_of(codes: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """(n, columns) codes in 32-bit words along the columns, number `order[i]` of a word in its i-th bits."""
    each = 32 // bits
    words: list[list[int]] = []
    for row in codes.unbind():
        numbers = [int(code) for code in row]
        words.append([])
        for start in range(0, len(numbers), each):
            word = sum(
                numbers[start + place] << bits * at for at, place in enumerate(order or tuple(range(each)))
            )
            words[-1].append(word - (1 << 32) if word >> 31 else word)
    return torch.tensor(words, dtype=torch.int32)


def zeroed(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """(in, out) codes as the weight that they are."""
    return ((codes - zeros[group]) * scales.float()[group]).t()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq(bits: int, version: str, shuffled: bool) -> None:
    most, groups = 2**bits - 1, INPUTS // GROUP
    codes, zeros = codes_of(INPUTS, 32, most), codes_of(groups, 32, most - 1) + 1
    scales, group = scales_of(groups, 32), torch.arange(INPUTS) // GROUP
    if shuffled:
        group = group[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(0))]
    tensors = {
        "qweight": words_of(codes.t(), bits).t(),
        "qzeros": words_of(zeros - int(version == "gptq"), bits),
        "scales": scales,
        "g_idx": group.int(),
    }
    said = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    published = parse_quantization("m", {"quantization_config": said})
    assert published is not None
    assert torch.allclose(lay_out("x", tensors, published), zeroed(codes, zeros, scales, group))


def test_awq() -> None:
    """Columns 0 to 7 pack to 0x75316420."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    assert words_of(torch.arange(8)[None], 4, order).item() == 0x75316420
    codes, zeros, scales = codes_of(INPUTS, 32), codes_of(2, 32), scales_of(2, 32)
    tensors = {"qweight": words_of(codes, 4, order), "qzeros": words_of(zeros, 4, order), "scales": scales}
    expected = zeroed(codes, zeros, scales, torch.arange(INPUTS) // GROUP)
    assert torch.allclose(lay_out("x", tensors, Published("awq", 4)), expected)


@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (576, 130)])
@pytest.mark.parametrize("exponents", [False, True])
def test_fp8_with_blocks_that_end_within(shape: tuple[int, int], exponents: bool) -> None:
    """Sides that are no multiple of 128 have one more, smaller block: 576 rows have five scales."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    counts = [-(-side // 128) for side in shape]
    scales = torch.rand(counts, generator=torch.Generator().manual_seed(1)) + 0.5
    stored = torch.randint(120, 130, counts, dtype=torch.uint8) if exponents else scales
    scales = torch.exp2(stored.float() - 127) if exponents else scales
    got = lay_out("x", {"weight": weight, "weight_scale_inv": stored}, Published("fp8", 8, (128, 128)))
    for row, column in ((0, 0), (127, 127), (shape[0] - 1, shape[1] - 1), (128, 0)):
        expected = float(weight[row, column].float() * scales[row // 128, column // 128])
        assert float(got[row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_4_bits(nested: bool) -> None:
    """The upper half of a byte comes first."""
    codes = codes_of(OUTPUTS, INPUTS).to(torch.uint8)
    flat = codes.flatten()
    blocks = len(flat) // 64
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": [OUTPUTS, INPUTS]}
    tensors = {
        "weight": (flat[0::2] << 4 | flat[1::2])[:, None],
        "weight.quant_map": torch.tensor(NF4.values),
    }
    largest = torch.rand(blocks, generator=torch.Generator().manual_seed(2)) + 0.1
    if nested:
        table, whole = torch.linspace(-1, 1, 256), torch.tensor([0.25])
        chosen = torch.arange(blocks, dtype=torch.uint8)
        state |= {"nested_blocksize": 256, "nested_offset": 0.5}
        largest = table[chosen.int()] * whole + 0.5
        tensors |= {"weight.nested_quant_map": table, "weight.nested_absmax": whole, "weight.absmax": chosen}
    else:
        tensors["weight.absmax"] = largest
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    expected = (torch.tensor(NF4.values)[flat.int()].view(-1, 64) * largest[:, None]).view(OUTPUTS, INPUTS)
    assert torch.equal(lay_out("x", tensors, Published("bitsandbytes")), expected)


def test_bitsandbytes_in_8_bits() -> None:
    codes = codes_of(OUTPUTS, INPUTS, 200).sub(100).to(torch.int8)
    scales = torch.rand(OUTPUTS)
    got = lay_out("x", {"weight": codes, "SCB": scales}, Published("bitsandbytes"))
    assert torch.allclose(got, codes * scales[:, None] / 127)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_of_packed_integers(bits: int, symmetric: bool) -> None:
    half = 2 ** (bits - 1)
    codes, scales = codes_of(OUTPUTS, INPUTS, 2 * half - 1) - half, scales_of(OUTPUTS, 2)
    tensors = {
        "weight_packed": words_of(codes + half, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
    }
    zeros = torch.zeros(OUTPUTS, 2)
    if not symmetric:
        own = codes_of(OUTPUTS, 2, 5) - 3
        tensors["weight_zero_point"] = words_of((own + half).t(), bits).t().contiguous()
        zeros = own.float()
    expected = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
    got = lay_out("x", tensors, Published("compressed-tensors", bits, zeros=not symmetric))
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (OUTPUTS, 1), (3, 2)])
def test_compressed_tensors_that_are_not_packed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = (torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    scales = torch.rand(shape) + 0.1
    got = lay_out("x", {"weight": weight, "weight_scale": scales}, Published("compressed-tensors", 8))
    for row, column in ((0, 0), (7, 31), (8, 32), (OUTPUTS - 1, INPUTS - 1)):
        place = (row // 8, column // 32) if shape == (3, 2) else (row, 0) if len(shape) == 2 else ...
        scale = float(scales.reshape(-1)[0] if place is ... else scales[place])
        assert float(got[row, column]) == pytest.approx(float(weight[row, column]) * scale, rel=1e-5)


def test_parts_of_weights_are_one_and_the_rest_is_as_it_is_stored() -> None:
    names = ["a.q.qweight", "a.q.qzeros", "a.q.scales", "a.q.g_idx", "a.q.bias", "a.norm.weight"]
    assert weights_of(names, Published("gptq", 4)) == {
        "a.q.weight": {
            **{"qweight": "a.q.qweight", "qzeros": "a.q.qzeros", "scales": "a.q.scales"},
            "g_idx": "a.q.g_idx",
        },
        "a.q.bias": {"": "a.q.bias"},
        "a.norm.weight": {"": "a.norm.weight"},
    }
    fp8 = ["a.q.weight", "a.q.weight_scale_inv", "a.norm.weight", "a.q.input_scale"]
    assert weights_of(fp8, Published("fp8", 8, (128, 128))) == {
        "a.q.weight": {"weight": "a.q.weight", "weight_scale_inv": "a.q.weight_scale_inv"},
        "a.norm.weight": {"": "a.norm.weight"},
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of 3 bits in the format 'gptq'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ of 4 bits in the version 'gemv'"),
        ({"quant_method": "fp8"}, "FP8 with blocks of None"),
        ({"quant_method": "hqq"}, "the method 'hqq'"),
        ({"quant_method": "mxfp4"}, "the method 'mxfp4'"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}},
            "compressed-tensors in the format 'nvfp4-pack-quantized'",
        ),
        ("gptq", "the method None"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        parse_quantization("m", {"model_type": "llama", "quantization_config": config})
    assert said in str(raised.value) and "docs/models.md lists" in str(raised.value)


@pytest.mark.parametrize("spoilt", ["scales", "qzeros"])
def test_parts_that_do_not_fit_are_refused(spoilt: str) -> None:
    tensors = {
        "qweight": words_of(codes_of(32, INPUTS), 4).t().contiguous(),
        "qzeros": words_of(codes_of(2, 32), 4),
        "scales": scales_of(2, 32),
    }
    tensors[spoilt] = tensors[spoilt][:, :1]
    if spoilt == "scales":
        del tensors[spoilt]
    with pytest.raises(CheckpointError, match=r"the parts of x do not make a weight of gptq \("):
        lay_out("x", tensors, Published("gptq", 4, adds_one=True))


def test_a_span_of_a_quantised_checkpoint_is_that_of_its_numbers_in_float32(
    tiny_stories: Path, tmp_path: Path
) -> None:
    """FP8 blocks in one folder, what they stand for in another; and the settings are part of the revision."""
    bundled = open_checkpoint(tiny_stories, "tiny-stories")
    stored = {name: bundled.read(name) for name in bundled.names()}
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dim() < 2 or "layers" not in name:
            packed[name] = plain[name] = tensor
            continue
        scales = torch.full([-(-side // 128) for side in tensor.shape], 0.01)
        packed[name] = (tensor.float() / 0.01).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scales
        plain[name] = packed[name].float() * 0.01
    config = json.loads((tiny_stories / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    outputs: list[Tensor] = []
    revisions: set[str] = set()
    for kind, tensors, extra in (("plain", plain, {}), ("packed", packed, {"quantization_config": said})):
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(tiny_stories / "tokenizer.json", folder)
        (folder / "config.json").write_text(json.dumps({**config, **extra}))
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder, kind)
        revisions.add(checkpoint.spec.revision)
        span = BlockSpan(1, 3)
        compute = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 22)
        runner = open_runner(checkpoint, span, compute)
        outputs.append(run_session(runner, torch.ones(4, 320) * torch.arange(1, 5)[:, None], span))
    assert torch.equal(*outputs)
    assert len(revisions) == 2
