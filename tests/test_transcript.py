"""What a transcript makes of tokens: text, and an end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from p2pinfer.models.text import Tokenizer, load_tokenizer
from p2pinfer.resume import GenerationState, decode_state
from p2pinfer.transcript import Transcript


@pytest.fixture
def tokenizer(tiny_stories: Path) -> Tokenizer:
    return load_tokenizer(tiny_stories)


def begin(
    tokenizer: Tokenizer, *stop: str, max_new_tokens: int = 10, token_ids: Iterable[int] = ()
) -> Transcript:
    prompt_ids = tuple(tokenizer.encode("Once upon a time"))
    return Transcript(
        tokenizer,
        GenerationState("m", "a" * 32, prompt_ids, max_new_tokens, 0.0, 1.0, 0, 0, stop, tuple(token_ids)),
    )


def taken(transcript: Transcript, ids: Sequence[int]) -> list[str]:
    """The texts of `ids`, as far as they are wanted."""
    return [transcript.take(each) for each in ids if transcript.finish_reason is None]


def byte_token(tokenizer: Tokenizer, byte: bytes) -> int:
    return next(token_id for token_id in range(4096) if tokenizer.token_bytes(token_id) == byte)


def test_an_end_of_text_ends_it_and_is_no_text(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_ids
    words = tokenizer.encode(" there was")[-2:]
    transcript = begin(tokenizer)
    assert taken(transcript, [*words, eos, *words])[2:] == [""]
    assert (transcript.text, transcript.finish_reason) == (tokenizer.decode(words), "eos")
    assert transcript.resume_token is None


def test_the_last_token_that_was_asked_for_ends_it(tokenizer: Tokenizer) -> None:
    transcript = begin(tokenizer, max_new_tokens=2)
    assert len(taken(transcript, [300, 301, 302])) == 2
    assert transcript.finish_reason == "length"
    assert transcript.ids == (*transcript.prompt_ids, 300, 301)
    assert len(transcript.ids) == transcript.max_ids


def test_a_stop_ends_it_and_what_only_looked_like_one_is_kept(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four five")
    text = tokenizer.decode(ids)
    stopped = begin(tokenizer, " three", "zebra", max_new_tokens=len(ids))
    taken(stopped, ids)
    assert (stopped.text, stopped.finish_reason) == (text.partition(" three")[0], "stop")
    held = begin(tokenizer, text[-4:] + "!", max_new_tokens=len(ids))
    taken(held, ids)
    assert (held.text, held.finish_reason) == (text, "length")


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    first, second = byte_token(tokenizer, b"\xc3"), byte_token(tokenizer, b"\xa9")
    transcript = begin(tokenizer, max_new_tokens=3)
    assert taken(transcript, [first, second, first]) == ["", "é", "\N{REPLACEMENT CHARACTER}"]


def test_a_resumed_text_keeps_what_was_held_back(tokenizer: Tokenizer) -> None:
    """The beginning of a stop text, and half a character."""
    first, second = byte_token(tokenizer, b"\xc3"), byte_token(tokenizer, b"\xa9")
    word = tokenizer.encode("xyz")[-1]
    cut = begin(tokenizer, (tokenizer.decode([word]) + "é")[-2:])
    texts = taken(cut, [word, first])
    assert cut.resume_token is not None
    resumed = Transcript(tokenizer, decode_state(cut.resume_token))
    assert (resumed.text, resumed.resume_token) == (cut.text, cut.resume_token)
    assert taken(resumed, [second]) == [""]
    assert resumed.finish_reason == "stop"
    assert resumed.text == "".join(texts) == tokenizer.decode([word])[:-1]


def test_a_text_that_had_ended_takes_no_more_of_its_state(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_ids
    transcript = begin(tokenizer, token_ids=(300, eos, 301))
    assert (transcript.token_ids, transcript.finish_reason) == ([300, eos], "eos")
