from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from p2pinfer.errors import LocalError
from p2pinfer.hf.remote_layers import RemoteLayers

from ..models.conftest import one_thread as one_thread  # fixtures
from ..models.conftest import write_checkpoint as write_checkpoint
from .support import classifier, distributed

peft: Any = pytest.importorskip("peft", reason="what adapts these models: pip install '.[dev]'")
library: Any = transformers

# The libraries warn of what they do to each other.
pytestmark = pytest.mark.filterwarnings("default")

STEPS = 4
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WriteCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module", params=["gemma2", "llama", "mistral", "mixtral", "qwen2", "qwen3"])
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_checkpoint: WriteCheckpoint,
) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: WriteCheckpoint) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def local(folder: Path, auto: str = "AutoModelForCausalLM", **options: Any) -> Any:
    return getattr(library, auto).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Padded on the left and on the right."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 199, (3, 55))
    mask = torch.ones_like(ids)
    mask[1, :20], mask[2, 41:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 20] = -100
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


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


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(model, config)


def trained(model: Any) -> Iterator[Tensor]:
    return (each for _, each in sorted(model.named_parameters()) if each.requires_grad)


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


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_ids_are_those_of_transformers(
    folder: Path, options: dict[str, Any], use_cache: bool
) -> None:
    asked = batch()
    prompt = {name: asked[name][:2, :30] for name in ("input_ids", "attention_mask")}
    ours, theirs = distributed(folder), local(folder)
    found: list[Tensor] = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(model.generate(**prompt, max_new_tokens=6, use_cache=use_cache, **options))
    assert torch.equal(*found)
    assert len(ours.model.layers.passes.trainer.steps) == (6 if use_cache else 0)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (peft.LoraConfig(r=4, target_modules=ALL_LINEAR, init_lora_weights=False, task_type="CAUSAL_LM"), 6),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), 0),
    ],
)
def test_what_peft_has_wrapped_generates_what_it_does_on_one_machine(
    llama: Path, config: Any, steps: int
) -> None:
    asked = batch()
    prompt = {name: asked[name][:2, :30] for name in ("input_ids", "attention_mask")}
    ours, theirs = adapted(distributed(llama), config), adapted(local(llama), config)
    found = [ours.generate(**prompt, max_new_tokens=6)]
    found.append(theirs.generate(**prompt, max_new_tokens=6, use_cache=False))
    assert torch.equal(*found)
    [layers] = [each for each in ours.modules() if isinstance(each, RemoteLayers)]
    blocks: Any = layers.passes.trainer
    assert len(blocks.steps) == steps


def test_a_prefix_is_before_every_token_that_is_generated(llama: Path) -> None:
    """Against forward passes: peft 0.21 loses a prefix when transformers 5.24 generates."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ours, theirs = adapted(distributed(llama), config), adapted(local(llama), config)
    ids = batch()["input_ids"][:1, :30]
    found = ours.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for _ in range(5):
        logits = theirs(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        logits[:, 2] = -torch.inf  # what min_new_tokens does to the last token of a text
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(found, ids)


def test_deep_prompts_are_applied_to_every_token_that_is_generated(llama: Path) -> None:
    ours = distributed(llama, deep_prompts=3)
    prompt = batch()["input_ids"][:1, :12]
    found = [ours.generate(input_ids=prompt, max_new_tokens=4, use_cache=each) for each in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"exclude_modules": ["o_proj"], "layers_to_transform": [1, 3]},
    ],
)
def test_what_peft_saves_runs_on_one_machine_and_what_it_saved_there_runs_here(
    llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = peft.LoraConfig(r=4, target_modules=ALL_LINEAR, init_lora_weights=False, **options)
    ours = adapted(distributed(llama), config)
    with torch.no_grad():  # also those that are no LoRA, if there are any
        for each in trained(ours):
            each.add_(0.01)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(local(llama), tmp_path)
    again = peft.PeftModel.from_pretrained(distributed(llama), tmp_path)
    kept = batch()["attention_mask"].bool()
    with torch.no_grad():
        logits = [model(**batch()).logits[kept] for model in (ours, theirs, again)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(logits[0], logits[2])


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


def test_an_adapter_is_switched_off_and_on(llama: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ours = adapted(distributed(llama), config)
    plain = distributed(llama)
    with torch.no_grad():
        assert not torch.equal(ours(**batch()).logits, plain(**batch()).logits)
        with ours.disable_adapter():
            assert torch.equal(ours(**batch()).logits, plain(**batch()).logits)


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


def test_what_is_trained_without_peft_is_kept_in_a_file(llama: Path, tmp_path: Path) -> None:
    one, other = distributed(llama, deep_prompts=2), distributed(llama, deep_prompts=2)
    for model in (one, other):
        for each in (model.model, model.lm_head):
            each.requires_grad_(False)
        model.model.layers.deep_prompts.requires_grad_(True)
    one.save_pretrained(tmp_path)
    other.load_trained(tmp_path)
    assert torch.equal(one.model.layers.deep_prompts, other.model.layers.deep_prompts)
    with pytest.raises(LocalError, match="which this model has not"):
        distributed(llama).load_trained(tmp_path)


# ------------------------------------------------------------------ refusals


def test_labels_behind_padding_are_refused_with_a_sentence(llama: Path) -> None:
    asked = batch()
    asked["labels"] = asked["input_ids"]
    with pytest.raises(LocalError, match="set them to -100"):
        distributed(llama)(**asked)


def test_other_masks_are_refused_with_a_sentence(llama: Path) -> None:
    with pytest.raises(LocalError, match=r"on the swarm it is \(batch, seq\)"):
        distributed(llama)(input_ids=batch()["input_ids"], attention_mask=torch.ones(3, 1, 55, 55))


def test_other_adapters_than_lora_are_refused_with_a_sentence(llama: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(LocalError, match="products take LoRA"):
        adapted(distributed(llama), config)(**batch())


def test_biases_of_an_adapter_are_refused_with_a_sentence(llama: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(LocalError, match="set lora_bias to False"):
        adapted(distributed(llama), config)(**batch())


def test_scores_of_routers_are_refused_with_a_sentence(
    tmp_path: Path, write_checkpoint: WriteCheckpoint
) -> None:
    with pytest.raises(LocalError, match="the scores of routers stay on the swarm"):
        distributed(write_checkpoint(tmp_path, "mixtral"))(**batch(), output_router_logits=True)


def test_a_cache_that_is_no_prefix_of_all_rows_is_refused_with_a_sentence(llama: Path) -> None:
    ours, theirs = distributed(llama), local(llama)
    cache = theirs(batch()["input_ids"][:, :4]).past_key_values
    with pytest.raises(LocalError, match="differ from row to row"):
        ours(input_ids=batch()["input_ids"], past_key_values=cache)
    with pytest.raises(LocalError, match="past_key_values is a tuple"):
        ours(input_ids=batch()["input_ids"], past_key_values=((torch.zeros(3, 2, 4, 16),) * 2,))
    short = library.DynamicCache()
    short.update(torch.zeros(3, 2, 4, 16), torch.zeros(3, 2, 4, 16), 0)
    with pytest.raises(LocalError, match="a prefix of 1 blocks"):
        ours(input_ids=batch()["input_ids"], past_key_values=short)


def test_a_mask_that_hides_a_part_of_a_prefix_is_refused_with_a_sentence(llama: Path) -> None:
    ours, theirs, ids = distributed(llama), local(llama), batch()["input_ids"][:1]
    cache = theirs(ids[:, :4]).past_key_values
    mask = torch.ones(1, 59)
    mask[0, 2] = 0
    with pytest.raises(LocalError, match="hides a part of the prefix"):
        ours(input_ids=ids, attention_mask=mask, past_key_values=cache)


def test_a_layer_alone_says_how_it_is_called(llama: Path) -> None:
    ours = distributed(llama)
    with pytest.raises(LocalError, match=r"layers\[i : i \+ 1\]"):
        ours.model.layers[0](torch.zeros(1, 1, 48))
    with pytest.raises(LocalError, match="runs on the swarm"):
        ours.model.layers[0].self_attn.q_proj(torch.zeros(1, 48))
    with pytest.raises(LocalError, match="at least one"):
        ours.model.layers[3:1]


def test_an_adapters_values_are_taken_anew_when_they_change_and_not_before(llama: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ours = adapted(distributed(llama), config)
    blocks = ours.base_model.model.model.layers.passes.trainer
    with torch.no_grad():
        ours(**batch())
        ours(**batch())
        train_in_place(ours)
        ours(**batch())
    assert blocks.adapters[0] is blocks.adapters[1]
    assert blocks.adapters[1] is not blocks.adapters[2]


def train_in_place(model: Any) -> None:
    """Change the parameters as a fused optimiser does: without a trace in their versions."""
    for each in trained(model):
        version = each._version
        each.data.add_(0.01)
        assert each._version == version
