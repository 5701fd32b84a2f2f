"""What a transcript makes of tokens: text, and an end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from p2pinfer.generation.saved_state import GenerationState, decode_state
from p2pinfer.generation.transcript import Transcript
from p2pinfer.models.text.text import Tokenizer


def begin(
    tokenizer: Tokenizer,
    *stop: str,
    max_new_tokens: int = 10,
    token_ids: Iterable[int] = (),
    **more: Any,
) -> Transcript:
    prompt_ids = tuple(tokenizer.encode("Once upon a time"))
    return Transcript(
        tokenizer,
        GenerationState(
            "m", "a" * 32, prompt_ids, max_new_tokens, 0.0, 1.0, 0, 0, stop, tuple(token_ids), **more
        ),
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
    assert transcript.ids == [*transcript.prompt_ids, 300, 301]
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


@pytest.fixture(scope="module")
def chat() -> Tokenizer:
    """a, b, é in two tokens, and the special tokens <|im_end|> and <|x y|>."""
    backend: Any = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ã": 2, "©": 3}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>", "<|x y|>"])
    return Tokenizer(backend, eos_ids=frozenset())


END, OTHER = 4, 5


def chatted(tokenizer: Tokenizer, ids: Sequence[int], *stop: str, **more: Any) -> tuple[str, str | None]:
    """The text, and why it ended; what it shows as it goes is the same."""
    state = GenerationState("m", "0" * 32, (0,), len(ids), 0.0, 1.0, 0, 0, stop, **more)
    transcript = Transcript(tokenizer, state)
    texts = taken(transcript, ids)
    assert "".join(texts) == transcript.text
    return transcript.text, transcript.finish_reason


@pytest.mark.parametrize(
    ("stop", "ids", "text"),
    [
        ("<|im_end|>", [0, 1, END, 0, 1], "ab"),
        ("b<|im_end|>", [0, 1, END, 0], "a"),  # its beginning is held back until it is clear
        ("<|im_end|>a", [0, 1, END, 0, 1], "ab"),
        ("<|im_end|><|x y|>", [0, END, OTHER, 1], "a"),
        ("b<|im_end|>a", [1, END, 1, END, 0], "b"),
        ("<|im_end|>é", [0, END, 2, 3, 1], "a"),
        ("ab", [1, 0, END, 1, 0], "b"),  # what is shown is matched, whatever is hidden in it
    ],
)
def test_a_stop_may_be_made_of_special_tokens(chat: Tokenizer, stop: str, ids: list[int], text: str) -> None:
    assert chatted(chat, ids, stop) == (text, "stop")


@pytest.mark.parametrize("stop", ["|", "im_end", "<", "x y"])
def test_no_stop_matches_what_nobody_sees_by_chance(chat: Tokenizer, stop: str) -> None:
    ids = [0, END, 1, OTHER]
    assert chatted(chat, ids, stop) == ("ab", "length")
    assert chatted(chat, ids, stop, show_special=True)[1] == "stop"


def test_special_tokens_are_text_if_they_are_to_be_shown(chat: Tokenizer) -> None:
    ids = [0, OTHER, 2, 3, END]
    assert chatted(chat, ids, show_special=True) == ("a<|x y|>é<|im_end|>", "length")
    assert chatted(chat, ids, show_special=True, eos_ids=(END,)) == ("a<|x y|>é<|im_end|>", "eos")
    assert chatted(chat, ids, eos_ids=(END,)) == ("aé", "eos")
    assert chatted(chat, ids, "<|im_end|>", show_special=True) == ("a<|x y|>é", "stop")


def test_a_text_ends_before_a_token_that_is_to_stop_it(chat: Tokenizer) -> None:
    for show in (False, True):
        assert chatted(chat, [0, 2, 3, END, 1], stop_ids=(1, END), show_special=show) == ("aé", "stop")
    assert chatted(chat, [0, 2, 1, 0], stop_ids=(1,)) == ("a\ufffd", "stop")


def test_an_end_of_text_may_complete_a_stop(chat: Tokenizer) -> None:
    assert chatted(chat, [0, 1, END], "b<|im_end|>", eos_ids=(END,)) == ("a", "stop")
    assert chatted(chat, [0, 1, END], "b<|im_end|>a", eos_ids=(END,)) == ("ab", "eos")


@given(ids=st.lists(st.sampled_from([0, 1, END, OTHER]), min_size=1, max_size=12), data=st.data())
def test_stops_are_found_as_in_the_text_with_its_special_tokens(
    chat: Tokenizer, ids: list[int], data: st.DataObject
) -> None:
    """Brute force over the whole: the first place at which a stop with a special token is complete."""
    words = ["a", "b", "<|im_end|>", "<|x y|>"]
    parts = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=3))
    stop = "".join([*parts, data.draw(st.sampled_from(words[2:]))])
    names = {0: "a", 1: "b", END: "<|im_end|>", OTHER: "<|x y|>"}
    whole = "".join(names[each] for each in ids)
    before = whole.partition(stop)[0].replace("<|im_end|>", "").replace("<|x y|>", "")
    assert chatted(chat, ids, stop) == (before, "stop" if stop in whole else "length")
