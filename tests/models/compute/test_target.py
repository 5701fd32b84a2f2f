from __future__ import annotations

from typing import Any

import pytest
import torch

from p2pinfer.client_config import ClientConfig
from p2pinfer.errors import ConfigError
from p2pinfer.models.compute import target
from p2pinfer.models.compute.target import Target, choose_target, choose_targets
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import FreeMemory
from p2pinfer.models.numerics import BFLOAT16, FLOAT16, FLOAT32

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(_device: torch.device) -> tuple[int, int]:
        return 100 << 30, 140 << 30

    def nothing(_device: torch.device) -> int:
        return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, nothing)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_is_the_cpu_and_the_checkpoints_dtype_if_that_is_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_target(ComputeConfig(), "float32") == Target(CPU, FLOAT32)
    assert choose_target(ComputeConfig(), "float16") == Target(CPU, FLOAT32)
    assert choose_target(ComputeConfig(dtype="float16"), "float32") == Target(CPU, FLOAT16)
    for numerics, other in ((BFLOAT16, torch.float32), (FLOAT32, torch.bfloat16)):

        def can_pack(_device: torch.device, wanted: torch.dtype, slow: torch.dtype = other) -> bool:
            return wanted != slow

        monkeypatch.setattr(target, "can_pack", can_pack)
        assert choose_target(ComputeConfig(), "bfloat16") == Target(CPU, numerics)


@pytest.mark.usefixtures("two_gpus")
def test_with_a_gpu_it_is_the_gpu_and_the_checkpoints_dtype() -> None:
    assert choose_target(ComputeConfig(), "float16") == Target(torch.device("cuda"), FLOAT16)
    assert choose_target(ComputeConfig(device="cuda:1"), "bfloat16").device == torch.device("cuda:1")
    assert choose_target(ComputeConfig(device="cpu"), "float32").device == CPU
    assert choose_target(ComputeConfig(), "float16").cache_budget() == 80 << 30


@pytest.mark.usefixtures("two_gpus")
def test_several_devices_compute_in_the_same_numerics(monkeypatch: pytest.MonkeyPatch) -> None:

    def never(_device: torch.device, _dtype: torch.dtype) -> bool:
        return False

    cards = [Target(torch.device(f"cuda:{index}"), BFLOAT16) for index in (0, 1)]
    assert list(choose_targets(ComputeConfig(device="cuda:0,cuda:1"), "bfloat16")) == cards
    monkeypatch.setattr(target, "can_pack", never)
    slow = choose_targets(ComputeConfig(device="cuda:0,cpu"), "bfloat16")
    assert [each.numerics for each in slow] == [FLOAT32, FLOAT32]
    with pytest.raises(ConfigError, match="there is no device cuda:2"):
        choose_targets(ComputeConfig(device="cuda:0,cuda:2"), "bfloat16")


def test_several_devices_are_for_nodes_alone() -> None:
    ComputeConfig(device="cuda:0,cuda:1,cpu")
    with pytest.raises(ConfigError, match="unknown device 'cuda:0,cuda:1'"):
        ClientConfig(device="cuda:0,cuda:1")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ComputeConfig(device="cuda"), "there is no device cuda: this computer has 0 CUDA devices"),
        (ComputeConfig(device="cuda:3"), "there is no device cuda:3"),
    ],
)
def test_what_is_not_to_be_had_is_refused_in_a_line(config: ComputeConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_target(config, "float32")


@pytest.mark.parametrize("config", [ComputeConfig, ClientConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "toaster"}, "unknown device 'toaster'; choose one of auto, cpu, cuda"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "cuda:"}, "unknown device 'cuda:'"),
        ({"device": "cuda:0,"}, "unknown device 'cuda:0,'"),
        ({"device": "auto,cpu"}, "unknown device 'auto,cpu'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose one of auto, float32, bfloat16, float16"),
    ],
)
def test_what_no_machine_has_is_refused_by_the_config(
    config: type[ComputeConfig | ClientConfig], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize(("available_gib", "budget_gib"), [(8, 2), (64, 4)])
def test_an_automatic_cache_takes_a_quarter_of_free_memory_and_no_more_than_four_gibibytes(
    monkeypatch: pytest.MonkeyPatch, available_gib: int, budget_gib: int
) -> None:
    def free_on(_device: torch.device) -> FreeMemory:
        return FreeMemory(available_gib << 30)

    monkeypatch.setattr(target, "free_on", free_on)
    assert Target(CPU, FLOAT32).cache_budget() == budget_gib << 30
