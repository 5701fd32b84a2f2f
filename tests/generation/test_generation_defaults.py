"""Texts of models that come with a generation_config.json, against transformers' own `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from torch import Tensor

from p2pinfer.client_config import GenerationConfig
from p2pinfer.errors import ConfigError, PromptTooLong
from p2pinfer.generation.first_state import new_state, sampling_of
from p2pinfer.generation.generation import Generation
from p2pinfer.generation.saved_state import GenerationState, decode_state
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.text.generation_file import GenerationDefaults, read_generation_defaults
from p2pinfer.models.text.processors import Processors
from p2pinfer.models.text.sampling import candidates
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig
from p2pinfer.models.text.text import load_tokenizer

from ..node.memory_swarm import FLOAT32, open_memory_swarm, route_over
from .texts import Walk

PROMPT: Final = "Once upon a time there was a little fox, a little fox who"
AutoModel: Any = transformers.AutoModelForCausalLM


def random_llama(folder: Path, tokenizer_of: Path) -> Path:
    """A folder as transformers saves it, whose weights are so large that some logits clearly win."""
    torch.manual_seed(5)
    config: Any = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    made: Any = transformers.LlamaForCausalLM
    made(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / name, folder)
    return folder


@pytest.fixture(params=["tiny-stories", "random llama"])
def folder(request: pytest.FixtureRequest, tiny_stories: Path, tmp_path: Path) -> Path:
    """A model whose generation_config.json may be written."""
    if request.param == "random llama":
        return random_llama(tmp_path, tiny_stories)
    return Path(shutil.copytree(tiny_stories, tmp_path / "copy"))


def ask(folder: Path, **said: Any) -> None:
    """Have the model wish for this."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **said}))


def state_of(folder: Path, prompt: str = PROMPT, /, **options: Any) -> GenerationState:
    """What a generation of the model in `folder` begins with."""
    spec = open_checkpoint(folder, "m").spec
    defaults = read_generation_defaults(folder)
    return new_state(spec, load_tokenizer(folder), prompt, GenerationConfig(**options), defaults)


async def our_ids(folder: Path, state: GenerationState) -> list[int]:
    """What a swarm generates, whose node is lost in the middle."""
    checkpoint = open_checkpoint(folder, "m")
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        await swarm.serve("b")
        walk = Walk(swarm, route_over(a=(0, 8)), route_over(b=(0, 8)))
        ends = load_embedding_and_head(checkpoint, FLOAT32)
        generation = Generation(walk, swarm.spec, ends, load_tokenizer(folder), state)
        ids: list[int] = []
        async for token in generation:
            ids.append(token.id)
            if len(ids) == 3:
                await swarm.network.kill("a")
        return ids


def their_ids(folder: Path, state: GenerationState, **options: Any) -> list[int]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([state.prompt_ids])
    found: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
    return [int(token_id) for token_id in found[0, len(state.prompt_ids) :]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "wish",
    [
        {"repetition_penalty": 1.3, "max_new_tokens": 24, "top_p": 0.5},
        {"repetition_penalty": 0.3, "max_new_tokens": 8},
        {"no_repeat_ngram_size": 2, "max_length": 36},
        {"suppress_tokens": [*range(3, 2048)], "begin_suppress_tokens": [*range(3000)], "max_new_tokens": 12},
        {"bad_words_ids": [[14], [263, 264]], "encoder_repetition_penalty": 1.4, "max_new_tokens": 12},
        {"sequence_bias": [[[300], 9.0], [[300, 301], 40.0]], "max_new_tokens": 8, "forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": [2, 1.8], "min_new_tokens": 5, "max_new_tokens": 30},
    ],
    ids=lambda wish: "+".join(wish),
)
async def test_greedy_ids_are_those_of_generate(
    request: pytest.FixtureRequest, folder: Path, wish: dict[str, Any]
) -> None:
    ask(folder, **wish)
    state = state_of(folder)
    ids = await our_ids(folder, state)
    assert ids == their_ids(folder, state)
    ask(folder)
    plain = their_ids(folder, state, max_new_tokens=len(ids))
    # The wish makes a difference, but for a random model that repeats nothing by itself.
    assert ids != plain or (
        request.node.callspec.params["folder"] == "random llama" and wish.get("repetition_penalty") != 0.3
    )


def test_a_word_of_the_user_s_goes_before_the_file(tiny_stories: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "copy"))
    ask(
        folder,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        repetition_penalty=1.1,
        max_new_tokens=7,
        min_length=9,
    )
    state = state_of(folder)
    assert sampling_of(state) == SamplingConfig(0.6, 0.9, 50, state.seed)
    assert (state.rules, state.max_new_tokens) == (LogitsRules(repetition_penalty=1.1, min_length=9), 7)
    asked = state_of(
        folder,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=3,
        min_new_tokens=0,
        min_p=0.1,
        seed=4,
        logit_bias={5: -1.5},
    )
    assert sampling_of(asked) == SamplingConfig(seed=4, min_p=0.1)
    assert (asked.rules, asked.max_new_tokens) == (LogitsRules(sequence_bias=(((5,), -1.5),)), 3)


def test_without_a_word_a_text_is_greedy(tiny_stories: Path) -> None:
    state = state_of(tiny_stories)
    assert (state.temperature, state.max_new_tokens, state.rules) == (0.0, 128, LogitsRules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "wish",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"do_sample": True, "min_p": 0.05, "top_k": 0, "no_repeat_ngram_size": 3},
        {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 0.001, "top_k": None},
    ],
    ids=lambda wish: "+".join(wish),
)
def test_what_is_drawn_from_is_what_generate_draws_from(folder: Path, wish: dict[str, Any]) -> None:
    """Over a text, the scores that transformers reports for each token it drew."""
    ask(folder, **wish)
    state = state_of(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([state.prompt_ids])
    torch.manual_seed(0)
    drawn = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        pad_token_id=0,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    ids: list[int] = drawn.sequences[0].tolist()
    process = Processors(state.rules, state.prompt_ids, len(state.prompt_ids) + 12, (2,))
    assert len(drawn.scores) == len(ids) - len(state.prompt_ids) > 0
    for number, (scores, logits) in enumerate(zip(drawn.scores, drawn.logits, strict=True)):
        allowed = process(logits[0], ids[: len(state.prompt_ids) + number])
        token_ids, probabilities = candidates(allowed, sampling_of(state))
        found = torch.zeros(4096).index_add(0, token_ids, probabilities)
        assert torch.allclose(found, scores[0].softmax(0), atol=1e-5)


async def test_a_resumed_text_goes_on_by_the_same_rules(checkpoint: Checkpoint, tiny_stories: Path) -> None:
    """Elsewhere the file may say something else, or nothing."""
    rules = LogitsRules(repetition_penalty=1.2, sequence_bias=(((300,), 3.0),))
    defaults = GenerationDefaults(SamplingConfig(temperature=0.9, top_k=30, min_p=0.02), rules, 12)
    tokenizer = load_tokenizer(tiny_stories)
    ends = load_embedding_and_head(checkpoint, FLOAT32)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        state = new_state(swarm.spec, tokenizer, PROMPT, GenerationConfig(seed=11, stop_ids=(9,)), defaults)

        def generation(state: GenerationState) -> Generation:
            return Generation(Walk(swarm, route_over(a=(0, 8))), swarm.spec, ends, tokenizer, state)

        whole = [token.id async for token in generation(state)]
        cut = generation(state)
        first = [(await anext(cut)).id for _ in range(4)]
        token = cut.resume_token
        assert token is not None
        await cut.aclose()
        assert [*first, *[token.id async for token in generation(decode_state(token))]] == whole
        assert (cut.result.seed, len(whole)) == (11, 12)


def test_a_length_that_the_prompt_has_reached_is_told(tiny_stories: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "copy"))
    ask(folder, max_length=10)
    with pytest.raises(PromptTooLong, match=r"max_length of this model is 10, .*--max-new-tokens"):
        state_of(folder)
    assert state_of(folder, max_new_tokens=5).max_new_tokens == 5


def test_a_token_past_the_embedding_is_said_to_be_one(tiny_stories: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "copy"))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 4096}))
    with pytest.raises(
        ConfigError, match=r"'<\|im_start\|>' in the prompt is token 4096 .* ends with token 4095"
    ):
        state_of(folder, "<|im_start|>Once")
    options: dict[str, Any] = {"stop_ids": (4096,), "logit_bias": {-1: 1.0}}
    for name, value in options.items():
        with pytest.raises(ConfigError, match=f"{name} names token .* has 0 to 4095"):
            state_of(folder, **{name: value})
    assert state_of(folder, stop=("<|im_start|>",)).stop == ("<|im_start|>",)
