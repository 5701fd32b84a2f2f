"""Answers that may call strict tools: text is free, and whatever is a call follows the tool's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from p2pinfer.api.errors import ApiError
from p2pinfer.api.formats import form_of, strict_grammar
from p2pinfer.api.tool_calls import OPENING_MARKS, CallReader, Style, Toolbox
from p2pinfer.models.text.call_marks import CALL_MARKS
from p2pinfer.models.text.grammar import Grammar
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

VOCAB = 4097  # with the one that is added below
AGE: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["age"],
    "additionalProperties": False,
}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def toolbox(style: Style) -> Toolbox:
    """A strict tool, and one whose arguments are its own matter."""
    return Toolbox((tool("add", parameters=AGE, strict=True), tool("look-up", parameters=AGE)), style)


@pytest.fixture(scope="module")
def tokenizer(tiny_stories: Path) -> Tokenizer:
    """The bundled model's, where Mistral's mark is a special token and the others are spelt."""
    backend = tokenizers.Tokenizer.from_file(str(tiny_stories / "tokenizer.json"))
    backend.add_special_tokens(["[TOOL_CALLS]"])
    return Tokenizer(backend, eos_ids=load_tokenizer(tiny_stories).eos_ids)


def refusal(tokenizer: Tokenizer, grammar: Grammar, text: str) -> str | None:
    """What of a text may not follow the rest of it; None if it may be a whole answer."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for at, token in enumerate([*ids, min(tokenizer.eos_ids)]):
        scores = torch.zeros(VOCAB)
        grammar(scores, ids[:at])
        if scores[token] == -torch.inf:
            return tokenizer.decode(ids[at:], show_special=True) or "its end"
    return None


def call(style: Style, name: str = "add", arguments: str = '{"age": 3}') -> str:
    key = "parameters" if style == "llama" else "arguments"
    written = f'{{"name": "{name}", "{key}": {arguments}}}'
    return f"<tool_call>\n{written}\n</tool_call>" if style == "hermes" else written


CASES: list[
    tuple[Style, str, int | None]
] = [  # an answer, and the number of its calls; None: it is impossible
    ("hermes", "It is 3 < 4, <tool> or not.", 0),
    ("hermes", call("hermes"), 1),
    ("hermes", f"Let me see.\n{call('hermes')}\n{call('hermes', 'look-up', '{}')} So.", 2),
    ("hermes", "Well <tool_call> is a mark", None),
    ("hermes", call("hermes", arguments='{"age": 12}'), None),
    ("hermes", call("hermes", arguments="{}"), None),
    ("hermes", call("hermes", name="remove"), None),
    ("hermes", "<tool_call>", None),
    ("mistral", "It is [TOOL].", 0),
    ("mistral", f"[TOOL_CALLS][{call('mistral')}, {call('mistral', 'look-up', '{}')}]", 2),
    ("mistral", 'Well.[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"age": 3}[TOOL_CALLS]look-up[ARGS]{"b": []}', 2),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"age": 0}', None),
    ("mistral", "Well[TOOL_CALLS], no", None),
    ("llama", "It is { 3 }.", 0),
    ("llama", call("llama"), 1),
    ("llama", f"<|python_tag|>{call('llama')}; {call('llama', 'look-up', '{}')}", 2),
    ("llama", '{"answer": 4}', None),
    ("llama", call("llama", arguments='{"age": "3"}'), None),
    ("llama", "Well <|python_tag|>print(3)", None),
]


@pytest.mark.parametrize(("style", "text", "calls"), CASES)
def test_text_is_free_and_calls_follow_their_parameters(
    tokenizer: Tokenizer, style: Style, text: str, calls: int | None
) -> None:
    grammar = strict_grammar(toolbox(style))
    assert grammar is not None
    follow = tokenizer.vocabularies.follow(grammar, 0, VOCAB, tokenizer.eos_ids)
    assert (refusal(tokenizer, follow, text) is None) == (calls is not None)
    if calls is not None:
        reader = CallReader(toolbox(style))
        found = [each for _, read in (reader.push(text), reader.finish()) for each in read]
        assert len(found) == calls
        assert all(each.arguments == {"age": 3} for each in found if each.name == "add")


def test_a_mark_that_is_a_special_token_may_be_written_as_one_or_spelt(tokenizer: Tokenizer) -> None:
    (mark,) = tokenizer.encode("[TOOL_CALLS]", add_special_tokens=False)
    assert tokenizer.special_texts[mark] in CALL_MARKS
    grammar = strict_grammar(toolbox("mistral"))
    assert grammar is not None
    spelt = [
        each for part in ("[TOOL_", "CALLS]") for each in tokenizer.encode(part, add_special_tokens=False)
    ]
    for begun in ([mark], spelt):
        follow = tokenizer.vocabularies.follow(grammar, 0, VOCAB, tokenizer.eos_ids)
        scores = torch.zeros(VOCAB)
        follow(scores, begun)
        assert {tokenizer.decode([int(each)])[:1] for each in scores.isfinite().nonzero()} <= {"[", "a", "l"}


def test_other_special_tokens_are_in_no_text_that_is_held_to_a_form(tokenizer: Tokenizer) -> None:
    grammar = strict_grammar(toolbox("hermes"))
    assert grammar is not None
    scores = torch.zeros(VOCAB)
    tokenizer.vocabularies.follow(grammar, 0, VOCAB, tokenizer.eos_ids)(scores, [])
    for special, text in tokenizer.special_texts.items():
        assert (scores[special] == 0) == (text in CALL_MARKS or special in tokenizer.eos_ids), text


def test_nothing_is_held_where_nothing_is_strict() -> None:
    tools = Toolbox((tool("add", parameters=AGE), tool("look-up", strict=False)), "hermes")
    assert strict_grammar(tools) is None
    assert form_of(None, tools, "format") is None
    assert form_of('{"type": "object"}', None, "format") == '{"type": "object"}'
    with pytest.raises(ApiError, match="format and tools are not supported together"):
        form_of('{"type": "object"}', tools, "format")


def test_the_marks_of_calls_are_those_that_grammars_know() -> None:
    assert set(OPENING_MARKS.values()) <= CALL_MARKS
