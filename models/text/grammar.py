"""Grammars: texts that follow a JSON schema, or any grammar, token by token.

llguidance parses the text so far and says which tokens may follow; all others get a logit of minus infinity
before a token is chosen. So it applies to greedy texts, to draws and to guesses alike. The parser follows the
tokens that it is asked about: what they have in common with those of before is kept, the rest is taken back.

Earley's parser over derivatives of regular expressions: https://github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from p2pinfer.errors import ConfigError

from .call_marks import CALL_MARKS
from .sampling_config import MAX_GRAMMAR_CHARS

# Between the parts of a JSON text. Without an end, a model that is unsure writes spaces for ever.
_SPACE: Final = r"[\x20\x0A\x0D\x09]{1,32}"


@cache
def _library() -> Any:
    """Module llguidance: 20 ms and 8 MB that texts without a grammar do without."""
    return import_module("llguidance")


class TokenBytes(Protocol):
    """Bytes of single tokens. `Tokenizer` is one."""

    @property
    def special_texts(self) -> Any:
        """Texts of special tokens, by id."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text."""
        ...


def as_lark(grammar: str) -> str:
    """A grammar in llguidance's form of Lark; one that begins with { is a JSON schema.

    Raises:
        ConfigError: It is too long, no JSON, or nothing that can be followed.
    """
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise ConfigError(f"the grammar is longer than {MAX_GRAMMAR_CHARS >> 10} KiB; shorten it")
    if grammar.lstrip().startswith("{"):
        try:
            grammar = f"start: {json_rule(json.loads(grammar))}"
        except (ValueError, RecursionError) as exc:
            raise ConfigError(f"the JSON schema cannot be read: {exc}") from exc
    return grammar


def json_rule(schema: dict[str, Any]) -> str:
    """Right side of a Lark rule for JSON that follows a schema."""
    own: object = schema.get("x-guidance")
    options = {"whitespace_pattern": _SPACE, **(own if isinstance(own, dict) else {})}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def check_grammar(grammar: str) -> None:
    """Nothing, if texts can follow it. Blocks for as long as it is parsed.

    Raises:
        ConfigError: They cannot.
    """
    matcher = _library().LLMatcher
    fault: str = matcher.validate_grammar(matcher.grammar_from_lark(as_lark(grammar)))
    if fault:
        raise ConfigError(f"no text can follow this grammar: {fault.splitlines()[0]}")


class Grammar:
    """A grammar as it applies to one text: a logits processor."""

    def __init__(
        self,
        vocabulary: Callable[[], Any],
        grammar: str,
        prompt_tokens: int,
        eos_ids: Collection[int],
    ) -> None:
        """`vocabulary` is asked for when the first token is chosen: it takes long to make."""
        self._vocabulary = vocabulary
        self._eos_ids = frozenset(eos_ids)
        self._source = grammar
        self._prompt_tokens = prompt_tokens
        self._matcher: Any = None
        self._taken: list[int] = []

    def __call__(self, scores: Tensor, ids: Sequence[int]) -> None:
        """Forbid what may not follow.

        Args:
            scores: (vocab,) float32, changed in place.
            ids: All tokens so far, the prompt included.

        Raises:
            ConfigError: The grammar is faulty, too complex, or the text does not follow it.
        """
        text = ids[self._prompt_tokens :]
        if not self._eos_ids.isdisjoint(text):  # guesses behind the end of a text, which nobody will use
            return
        if self._matcher is None:
            matcher = _library().LLMatcher
            lark = matcher.grammar_from_lark(as_lark(self._source))
            self._matcher, self._taken = matcher(self._vocabulary(), lark, log_level=0), []
        self._follow(self._matcher, text)
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        fault: str = self._matcher.get_error()
        if fault:
            self._matcher = None  # it stays in error
            raise ConfigError(f"no text can follow this grammar: {fault.splitlines()[0]}")
        scores[: len(bias)].masked_fill_(bias[: len(scores)] == 0, -torch.inf)
        scores[len(bias) :] = -torch.inf

    def _follow(self, matcher: Any, ids: Sequence[int]) -> None:
        """Have the parser behind these tokens."""
        common = len(self._taken)
        if list(ids[:common]) != self._taken:
            pairs = zip(ids, self._taken, strict=False)
            common = next(
                (at for at, (here, there) in enumerate(pairs) if here != there), min(len(ids), common)
            )
            matcher.rollback(len(self._taken) - common)
        more = list(ids[common:])
        if more:
            matcher.consume_tokens(more)
        self._taken[common:] = more


class Vocabularies:
    """A tokenizer's tokens as grammars need them, made when they are first needed. Any thread may ask."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._made: dict[tuple[int, tuple[int, ...]], Any] = {}
        self._lock = threading.Lock()

    def follow(self, grammar: str, prompt_tokens: int, size: int, eos_ids: Collection[int]) -> Grammar:
        """The grammar for a text behind so many tokens of prompt, of a model with `size` logits."""
        ends = tuple(sorted(eos_ids))
        return Grammar(lambda: self._vocabulary(size, ends), grammar, prompt_tokens, ends)

    def _vocabulary(self, size: int, eos_ids: tuple[int, ...]) -> Any:
        with self._lock:
            if (size, eos_ids) not in self._made:
                ends = [each for each in eos_ids if each < size]
                library = _library()
                tokens = library.TokenizerWrapper(_Tokens(self._tokenizer, size, ends))
                self._made[size, eos_ids] = library.LLTokenizer(tokens, n_vocab=size, eos_token=ends)
            return self._made[size, eos_ids]


class _Tokens:
    """A tokenizer in the form that llguidance takes apart."""

    bos_token_id = None

    def __init__(self, tokenizer: TokenBytes, size: int, eos_ids: Sequence[int]) -> None:
        special = tokenizer.special_texts
        self.eos_token_id = eos_ids[0] if eos_ids else 0
        # Marks of calls are text to a grammar, so that a model may write them as it was taught.
        marked = {each for each, text in special.items() if text in CALL_MARKS}
        self.special_token_ids = [each for each in special if each < size and each not in marked]
        self.tokens = [
            special[each].encode() if each in special else tokenizer.token_bytes(each) for each in range(size)
        ]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace"), add_special_tokens=False)
