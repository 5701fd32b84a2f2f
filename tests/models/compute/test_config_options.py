"""Whatever a config may say is computed as transformers does it, or refused by name.

The fields come from transformers' own classes, so a release that adds one fails here until it is classified.
The oracle is its eager model: the logits of a prompt, and its own `generate` over its own cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, logging
from transformers.activations import ACT2CLS, ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.compute import paged_decode
from p2pinfer.models.compute.activations import ACTIVATIONS
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.configs.defaults import complete_config
from p2pinfer.models.configs.not_computed import NOT_COMPUTED
from p2pinfer.models.span import BlockSpan

from .config_options import (
    BASES,
    FAMILIES,
    HONOURED,
    LENIENT_NULLS,
    OF_PYTHON_ONLY,
    ROPES,
    ROPES_WITHOUT_EFFECT,
    WITHOUT_EFFECT,
    Config,
    Variant,
)

PROMPT = [(37 * index + 11) % 59 for index in range(36)]
NEW_TOKENS = 12
EVERY_VARIANT = [(family, variant) for family in FAMILIES for variant in (*HONOURED[family], *ROPES)]


def is_one_of_many(family: str, variant: Variant) -> bool:
    """Whether others try the same code: all families turn by the same ropes, and two try each rope."""
    if variant not in ROPES:
        return False
    others = FAMILIES[1:]
    return family not in (FAMILIES[0], others[ROPES.index(variant) % len(others)])


class Run(NamedTuple):
    """A prompt and what a model makes of it."""

    prompt: Tensor  # logits, (tokens, vocabulary)
    steps: Tensor  # logits that each new token was taken from
    ids: list[int]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    library: Any = logging
    library.set_verbosity_error()
    library.disable_progress_bar()


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(
            family,
            variant,
            marks=pytest.mark.sweep if is_one_of_many(family, variant) else (),
            id=f"{family}, {variant.name}",
        )
        for family, variant in EVERY_VARIANT
    ],
)
def test_an_option_is_honoured(
    family: str, variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_decode, "_MIN_CONTEXT", 64)
    expected = run_and_save(written(family, variant.changes), tmp_path)
    assert differ(expected, by_transformers(written(family, variant.against)))
    check_equal(by_us(tmp_path, as_on_a_gpu=family == "llama"), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_no_effect_has_none(family: str, tmp_path: Path) -> None:
    expected = by_transformers(written(family, {}))
    assert len(set(expected.ids)) > 3, "a text that repeats itself would show little"
    tried: list[Config] = [{}, WITHOUT_EFFECT[family], nulls_without_effect(family)]
    for changes in tried:
        assert not differ(run_and_save(written(family, changes), tmp_path), expected)
        check_equal(by_us(tmp_path), expected)


@pytest.mark.parametrize(("against", "changes"), ROPES_WITHOUT_EFFECT)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_of_a_rope_has_no_effect_has_none(
    family: str, against: Config, changes: Config, tmp_path: Path
) -> None:
    expected = by_transformers(written(family, against))
    assert not differ(run_and_save(written(family, changes), tmp_path), expected)
    check_equal(by_us(tmp_path), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_transformers_config_is_classified(family: str) -> None:
    known = {key for variant in (*HONOURED[family], *ROPES) for key in variant.changes}
    known |= WITHOUT_EFFECT[family].keys() | NOT_COMPUTED.keys() | OF_PYTHON_ONLY
    assert field_names(family) - known == set(), "see whether it changes the logits"


def test_every_setting_and_type_of_transformers_ropes_is_classified() -> None:
    tried = [variant.changes for variant in ROPES] + [changes for _, changes in ROPES_WITHOUT_EFFECT]
    dicts: list[dict[str, Any]] = [
        config.get(key) or {} for config in tried for key in ("rope_parameters", "rope_scaling")
    ]
    settings: Any = RopeParameters
    assert settings.__annotations__.keys() <= {key for rope in dicts for key in rope}
    types = {rope.get("rope_type", rope.get("type")) for rope in dicts}
    assert {*ROPE_INIT_FUNCTIONS, "default"} <= types


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_every_activation_of_transformers_is_computed_or_refused(name: str) -> None:
    functions: Any = ACT2FN
    if any(True for _ in functions[name].parameters()):
        with pytest.raises(
            CheckpointError, match="it has weights of its own, or transformers does not know it"
        ):
            complete_config("m", {"model_type": "llama", "hidden_act": name})
        return
    complete_config("m", {"model_type": "llama", "hidden_act": name})
    rows = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e4, -1e4])))
    before = rows.clone()
    torch.testing.assert_close(ACTIVATIONS[name](rows), functions[name](rows), atol=2e-5, rtol=2e-5)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_is_read_as_transformers_reads_it_or_refused(family: str) -> None:
    """What transformers takes is compared above; what it does not take must not be guessed."""
    for name in field_names(family) - nulls_without_effect(family).keys() - LENIENT_NULLS:
        config = {"model_type": family, **BASES[family], name: None}
        try:
            complete_config("m", config)
        except CheckpointError:
            continue
        assert transformers_takes(config) or name in WITHOUT_EFFECT[family] or name in OF_PYTHON_ONLY, name


def field_names(family: str) -> set[str]:
    return {field.name for field in fields(CONFIG_MAPPING[family])}


@cache
def nulls_without_effect(family: str) -> Mapping[str, None]:
    """The fields without effect for which transformers takes null."""
    names = WITHOUT_EFFECT[family].keys() & field_names(family)
    base = {"model_type": family, **BASES[family]}
    return {name: None for name in sorted(names) if transformers_takes({**base, name: None})}


def transformers_takes(config: Config) -> bool:
    try:
        CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception:  # its validation has errors of its own
        return False
    return True


def written(family: str, changes: Config) -> str:
    """The config.json of a family's base, changed."""
    return json.dumps({"model_type": family, **BASES[family], **changes})


@cache
def by_transformers(raw: str) -> Run:
    """What transformers makes of a config.json."""
    return run_transformers(build(raw))


def build(raw: str) -> Any:
    auto: Any = AutoModelForCausalLM
    model: Any = auto.from_config(read_config(raw), attn_implementation="eager", dtype=torch.float32).eval()
    draw_weights(model)
    return model


def run_and_save(raw: str, folder: Path) -> Run:
    """The same, and a folder that holds the config and the weights."""
    model = build(raw)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(raw)
    return run_transformers(model)


def run_transformers(model: Any) -> Run:
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        prompt = model(ids).logits[0]
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return Run(prompt, torch.cat(said.logits), said.sequences[0, len(PROMPT) :].tolist())


def read_config(raw: str) -> Any:
    """What the Auto classes make of a config.json."""
    config = json.loads(raw)
    if config["model_type"] == "mistral" and "layer_types" in config:
        config["model_type"] = "ministral"
    return AutoConfig.for_model(**config)


def draw_weights(model: Any) -> None:
    """The same for every config of the same shape, and so large that some logits clearly win."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "model.norm.weight":
                weight.fill_(3.0)
            elif name.endswith("bias"):
                weight.normal_(0, 0.3, generator=generator)
            elif weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
            elif "embed" in name:
                weight.normal_(0, 0.1, generator=generator)
            else:
                weight.normal_(0, 1.2 / weight.shape[-1] ** 0.5, generator=generator)


def by_us(folder: Path, *, as_on_a_gpu: bool = False) -> Run:
    checkpoint = open_checkpoint(folder, "m")
    config = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 20, page_tokens=16)
    ends, runner = (
        load_embedding_and_head(checkpoint, config),
        open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config),
    )
    if as_on_a_gpu:
        runner = SpanRunner([stage.recorded() for stage in runner.stages], runner.cache)
    lease = runner.cache.reserve(len(PROMPT) + NEW_TOKENS)
    step = partial(_step, runner, ends, lease)
    prompt = torch.cat((step(PROMPT[:21]), step(PROMPT[21:])))  # in pieces, as hops are sent it
    steps, ids = [prompt[-1]], [int(prompt[-1].argmax())]
    while len(ids) < NEW_TOKENS:
        steps.append(step(ids[-1:])[-1])
        ids.append(int(steps[-1].argmax()))
    return Run(prompt, torch.stack(steps), ids)


def _step(runner: SpanRunner, ends: Any, lease: Any, ids: list[int]) -> Tensor:
    (hidden,) = runner.run([Chunk(lease, lease.length, ends.embed(ids))])
    logits: Tensor = ends.logits(hidden)
    return logits


def check_equal(ours: Run, theirs: Run) -> None:
    torch.testing.assert_close(ours.prompt, theirs.prompt, atol=5e-4, rtol=1e-4)
    assert ours.ids == theirs.ids
    torch.testing.assert_close(ours.steps, theirs.steps, atol=5e-4, rtol=1e-4)


def differ(one: Run, other: Run) -> bool:
    """Whether it shows in the logits of the prompt or of the text, by far more than rounding makes."""
    if one.prompt.shape != other.prompt.shape:
        return True
    return max(distance(one.prompt, other.prompt), distance(one.steps, other.steps)) > 0.02


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
