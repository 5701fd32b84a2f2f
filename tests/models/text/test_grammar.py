"""Texts that follow a grammar, whatever the logits say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pinfer.errors import ConfigError
from p2pinfer.models.text.grammar import Grammar, check_grammar
from p2pinfer.models.text.sampling_config import MAX_GRAMMAR_CHARS
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

VOCAB = 4096
PROMPT = [7, 8, 9]
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "likes": {"type": "array", "items": {"enum": ["cats", "dogs"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "likes"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def tokenizer(tiny_stories: Path) -> Tokenizer:
    return load_tokenizer(tiny_stories)


def follow(tokenizer: Tokenizer, grammar: str) -> Grammar:
    return tokenizer.vocabularies.follow(grammar, len(PROMPT), VOCAB, tokenizer.eos_ids)


def masked(grammar: Grammar, ids: Sequence[int], scores: Tensor | None = None) -> Tensor:
    scores = torch.zeros(VOCAB) if scores is None else scores
    grammar(scores, [*PROMPT, *ids])
    return scores


def written(tokenizer: Tokenizer, grammar: Grammar, seed: int) -> list[int]:
    """Tokens that noise chooses, without the last one, which ends the text."""
    noise, ids = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(400):
        token = int(masked(grammar, ids, torch.randn(VOCAB, generator=noise)).argmax())
        if token in tokenizer.eos_ids:
            return ids
        ids.append(token)
    raise AssertionError("it has no end")


@given(st.integers(0, 1 << 32))
@settings(max_examples=15)
def test_noise_writes_what_the_schema_wants(tokenizer: Tokenizer, seed: int) -> None:
    ids = written(tokenizer, follow(tokenizer, PERSON), seed)
    said = json.loads(tokenizer.decode(ids))
    assert said.keys() == {"name", "age", "likes"}
    assert len(said["name"]) <= 8
    assert 0 <= said["age"] <= 99
    assert 1 <= len(said["likes"]) <= 3
    assert set(said["likes"]) <= {"cats", "dogs"}


def test_what_may_follow_depends_on_the_text_alone(tokenizer: Tokenizer) -> None:
    """Guesses are looked at and dropped, and a text that was resumed begins in its middle."""
    ids = written(tokenizer, follow(tokenizer, PERSON), 1)
    other = written(tokenizer, follow(tokenizer, PERSON), 2)
    grammar = follow(tokenizer, PERSON)
    for length in (0, 3, 1, len(ids), 2, 0, len(ids) - 1, 5):
        for text in (ids[:length], other[:length]):
            alone = masked(follow(tokenizer, PERSON), text)
            assert torch.equal(masked(grammar, text), alone)
    assert {int(each) for each in masked(grammar, ids).isfinite().nonzero()} >= tokenizer.eos_ids


def test_a_grammar_of_ones_own_may_be_in_lark(tokenizer: Tokenizer) -> None:
    ids = written(tokenizer, follow(tokenizer, 'start: "yes" | "no" /!{2,3}/'), 0)
    assert tokenizer.decode(ids) in ("yes", "no!!", "no!!!")


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ('{"type": "nonsense"}', "no text can follow this grammar: .*nonsense"),
        ('{"type": ', "the JSON schema cannot be read"),
        ('{"not": {}}', r'no text can follow this grammar: .*"not"'),
        ("start: other", "no text can follow this grammar: .*other"),
        ("start: /" + "a" * MAX_GRAMMAR_CHARS + "/", "longer than 256 KiB"),
    ],
)
def test_a_grammar_with_a_fault_is_refused(tokenizer: Tokenizer, grammar: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_grammar(grammar)
    with pytest.raises(ConfigError, match=says):
        masked(follow(tokenizer, grammar), [])


def test_a_text_that_does_not_follow_is_told_and_forgotten(tokenizer: Tokenizer) -> None:
    grammar = follow(tokenizer, PERSON)
    with pytest.raises(ConfigError, match="no text can follow this grammar"):
        masked(grammar, tokenizer.encode("Once upon", add_special_tokens=False))
    assert torch.equal(masked(grammar, []), masked(follow(tokenizer, PERSON), []))


def test_behind_the_end_anything_goes(tokenizer: Tokenizer) -> None:
    """A draft model may guess on there; the text is over, so it makes no difference."""
    (end,) = tokenizer.eos_ids
    grammar = follow(tokenizer, PERSON)
    ids = written(tokenizer, grammar, 3)
    before = masked(grammar, ids)
    assert masked(grammar, [*ids, end, 5]).isfinite().all()
    assert torch.equal(masked(grammar, ids), before)
