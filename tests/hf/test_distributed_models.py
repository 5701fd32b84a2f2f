"""Models of transformers whose blocks a swarm has: they compute and are trained as on one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from .one_machine import ALL_LINEAR, adapted, batch, library, local, peft, trained
from .support import classifier, distributed

# The libraries warn of what they do to each other.
pytestmark = pytest.mark.filterwarnings("default")

STEPS = 4


def train(model: Any, steps: int = STEPS, rate: float = 1e-3) -> list[float]:
    """Losses of a plain loop."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=rate)
    losses: list[float] = []
    for step in range(steps):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def check_alike(ours: Any, theirs: Any, rate: float = 1e-3) -> None:
    """Both are trained: losses and parameters are the same."""
    assert train(ours, rate=rate) == pytest.approx(train(theirs, rate=rate), rel=1e-4)
    ended = list(zip(trained(ours), trained(theirs), strict=True))
    assert ended
    for mine, other in ended:
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_it_is_a_model_of_transformers_that_computes_the_same(folder: Path) -> None:
    ours, theirs = distributed(folder), local(folder)
    assert isinstance(ours, transformers.PreTrainedModel)
    assert isinstance(ours, type(theirs))
    asked = batch()
    kept = asked["attention_mask"].bool()
    with torch.no_grad():
        mine, other = ours(**asked), theirs(**asked)
    torch.testing.assert_close(mine.logits[kept], other.logits[kept], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine.loss, other.loss, rtol=1e-5, atol=1e-5)


def test_lora_of_every_product_trains_as_on_one_machine(folder: Path) -> None:
    mixture = "mixtral" in str(local(folder).config.model_type)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        target_modules=ALL_LINEAR[:4] if mixture else ALL_LINEAR,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 3},
    )
    check_alike(adapted(distributed(folder), config), adapted(local(folder), config))


def test_prompt_tuning_trains_as_on_one_machine(folder: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    check_alike(adapted(distributed(folder), config), adapted(local(folder), config), rate=0.1)


def test_p_tuning_trains_as_on_one_machine(llama: Path) -> None:
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16)
    check_alike(adapted(distributed(llama), config), adapted(local(llama), config))


@pytest.mark.parametrize("tokens", [5, 1])
def test_prefix_tuning_trains_as_on_one_machine(folder: Path, tokens: int) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    check_alike(adapted(distributed(folder), config), adapted(local(folder), config), rate=0.1)


def test_a_projected_prefix_trains_as_on_one_machine(llama: Path) -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    )
    check_alike(adapted(distributed(llama), config), adapted(local(llama), config), rate=0.1)


def test_deep_prompts_train_as_on_one_machine(folder: Path) -> None:
    torch.manual_seed(5)
    ours = distributed(folder, deep_prompts=3)
    theirs = local(folder)
    prompts = nn.Parameter(ours.model.layers.deep_prompts.detach().clone())
    for model in (ours, theirs):
        for each in model.parameters():
            each.requires_grad_(False)
    ours.model.layers.deep_prompts.requires_grad_(True)
    theirs.register_parameter("deep_prompts", prompts)
    mask = batch()["attention_mask"]
    first = torch.where(mask.bool(), mask.cumsum(1) - 1, 3).clamp(max=3)

    def add(block: int) -> Callable[..., Any]:
        def hook(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            padded = torch.cat((prompts[block], torch.zeros(1, prompts.shape[-1])))
            return (args[0] + padded[first], *args[1:])

        return hook

    for block, layer in enumerate(theirs.model.layers):
        layer.register_forward_pre_hook(add(block))
    check_alike(ours, theirs, rate=0.01)


def test_a_classification_head_trains_as_on_one_machine(llama: Path) -> None:
    changes = {"num_labels": 3, "pad_token_id": 0}
    ours = classifier(llama, config_changes=changes)
    theirs = local(llama, "AutoModelForSequenceClassification", **changes)
    theirs.score.load_state_dict(ours.score.state_dict())
    for model in (ours, theirs):
        for name, each in model.named_parameters():
            each.requires_grad_(name.startswith("score"))

    def losses(model: Any) -> list[float]:
        optimizer = torch.optim.SGD(model.score.parameters(), lr=0.01)
        found: list[float] = []
        for step in range(STEPS):
            asked = batch(step)
            asked["labels"] = torch.tensor([0, 1, 2])
            loss = model(**asked).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    torch.testing.assert_close(ours.score.weight, theirs.score.weight, rtol=1e-3, atol=1e-5)


def test_embedding_and_head_can_be_trained_beside_an_adapter(llama: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    check_alike(adapted(distributed(llama), config), adapted(local(llama), config))


def test_a_part_of_the_layers_is_a_differentiable_function(llama: Path) -> None:
    ours, theirs = distributed(llama), local(llama)
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 48, requires_grad=True)
    output = ours.model.layers[1:3](hidden)
    [gradient] = torch.autograd.grad(output.square().sum(), hidden)
    captured: dict[str, Any] = {}

    def capture(_: object, __: object, kwargs: dict[str, Any]) -> None:
        captured.update(kwargs)

    theirs.model.layers[1].register_forward_pre_hook(capture, with_kwargs=True)
    theirs(input_ids=torch.ones(2, 9, dtype=torch.long), use_cache=False)
    reference = hidden.detach().requires_grad_()
    state = reference
    for layer in theirs.model.layers[1:3]:
        state = layer(state, **captured)
    [expected] = torch.autograd.grad(state.square().sum(), reference)
    torch.testing.assert_close(output, state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_the_trainer_of_transformers_trains_it_as_on_one_machine(llama: Path, tmp_path: Path) -> None:
    """With its default optimiser, which updates all parameters in one fused call."""
    config = peft.LoraConfig(r=4, target_modules=ALL_LINEAR)
    rows = [{name: each[0] for name, each in batch(seed).items()} for seed in range(6)]

    def losses(model: Any) -> list[float]:
        arguments = library.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = library.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    mine, other = losses(adapted(distributed(llama), config)), losses(adapted(local(llama), config))
    assert mine == pytest.approx(other, rel=1e-3)
    assert mine[-1] < 0.8 * mine[0]
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()
