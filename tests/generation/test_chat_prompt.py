"""Conversations as prompts: the tokens that transformers gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from p2pinfer.client_config import GenerationConfig
from p2pinfer.generation.first_state import new_state
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.text.chat_template import ChatTemplate
from p2pinfer.models.text.text import load_tokenizer

CHAT = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "Of a fox <s> and a hen"}]


def test_a_conversation_has_the_tokens_that_transformers_gives_it(tiny_stories: Path) -> None:
    """No second start token beside the template's own."""
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    spec, tokenizer = open_checkpoint(tiny_stories, "tiny-stories").spec, load_tokenizer(tiny_stories)
    template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizers: Any = transformers.PreTrainedTokenizerFast
    theirs: Any = tokenizers.from_pretrained(tiny_stories)
    expected = theirs.apply_chat_template(CHAT, chat_template=source, return_dict=False)
    state = new_state(spec, tokenizer, template.render(CHAT), GenerationConfig())
    assert list(state.prompt_ids) == expected
    assert expected[0] != expected[1]
