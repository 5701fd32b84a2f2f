"""Transcript of a generation: its tokens, the text that is certain, and whether it has ended."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from p2pinfer.models.text.text import Tokenizer
from p2pinfer.models.text.text_stream import StopMatcher, TextStream

from .saved_state import GenerationState, encode_state

FinishReason: TypeAlias = Literal["eos", "length", "stop"]


class Transcript:
    """Prompt and answer, token by token.

    Attributes:
        ids: All tokens, those of the prompt included; it only grows, so nobody needs a copy of it.
        prompt_ids: The prompt's tokens.
        token_ids: Those that follow it.
        finish_reason: Why there are no more to come; None if there are.
        eos_ids: The tokens that end it.
        packed: How many of its positions travelled packed; None until its first session is open.
    """

    def __init__(self, tokenizer: Tokenizer, state: GenerationState) -> None:
        """Begin with the tokens of `state`, which are of `tokenizer`'s model."""
        self.prompt_ids = state.prompt_ids
        self.ids: list[int] = [*state.prompt_ids]
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.packed = state.packed
        self._tokenizer = tokenizer
        self._state = state
        self.eos_ids = tokenizer.eos_ids if state.eos_ids is None else frozenset(state.eos_ids)
        self._stream = TextStream(tokenizer, show_special=state.show_special)
        self._stops = StopMatcher(state.stop, tokenizer.special_texts.values())
        self._text: list[str] = []
        for token_id in state.token_ids:
            if self.finish_reason is None:
                self.take(token_id)

    @property
    def max_ids(self) -> int:
        """Largest number of ids that there will be."""
        return len(self.prompt_ids) + self._state.max_new_tokens

    @property
    def prompt(self) -> str:
        """The prompt's text as the model sees it."""
        return self._tokenizer.decode(self.prompt_ids)

    @property
    def text(self) -> str:
        """The answer's text, as far as it is certain."""
        return "".join(self._text)

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended it; None if none did."""
        return self._stops.met

    @property
    def resume_token(self) -> str | None:
        """All of this as a resume token; None if it has come to its end, and not only to its last token."""
        if self.finish_reason not in (None, "length"):
            return None
        ids = tuple(self.token_ids)
        return encode_state(msgspec.structs.replace(self._state, token_ids=ids, packed=self.packed))

    def take(self, token_id: int) -> str:
        """Add a token and return the text that became certain with it."""
        self.ids.append(token_id)
        self.token_ids.append(token_id)
        special = self._tokenizer.special_texts.get(token_id, "")
        certain = ""
        if token_id in self._state.stop_ids:
            self.finish_reason = "stop"
        elif token_id in self.eos_ids:
            self.finish_reason = "eos"
        else:
            certain = self._stream.push(token_id)
            if len(self.token_ids) == self._state.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            certain += self._stream.finish()
        if self.finish_reason == "eos" and self._state.show_special:
            certain += special
        text, stopped = self._stops.push(certain, "" if self._state.show_special else special)
        if stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self._stops.finish()
        self._text.append(text)
        return text
