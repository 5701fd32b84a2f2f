from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from p2pinfer.errors import CheckpointError, ConfigError
from p2pinfer.models.text.text import Tokenizer, load_tokenizer
from p2pinfer.models.text.text_stream import StopMatcher, TextStream

AutoTokenizer: Any = transformers.AutoTokenizer

TEXTS = [
    "Once upon a time, there was a little girl.",
    "  two spaces, a tab\tand\n\nlines  ",
    "naïve café, 日本語, Ελλάδα, 🙂👩‍👩‍👧 <s>",
    "",
]


@pytest.fixture(scope="session")
def bundled(tiny_stories: Path) -> Tokenizer:
    return load_tokenizer(tiny_stories)


@pytest.fixture(scope="session")
def smol(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture(params=["bundled", "smol"])
def pair(request: pytest.FixtureRequest, tiny_stories: Path) -> tuple[Tokenizer, Any]:
    """A tokenizer, and transformers' of the same folder."""
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    folder = tiny_stories if request.param == "bundled" else request.getfixturevalue("smollm2")
    return tokenizer, AutoTokenizer.from_pretrained(folder)


def sentencepiece(decoder: Any) -> tokenizers.Tokenizer:
    """A tokenizer as Llama 2's, of single characters and bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", *"abcdefgh"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    made_any: Any = made
    made_any.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made_any.decoder = decoder
    made.add_special_tokens(["<s>", "</s>"])
    return made


def llama_2() -> tokenizers.Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece(decoders.Sequence(steps))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(pair: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, theirs = pair
    ids = tokenizer.encode(text)
    assert ids == theirs(text).input_ids
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@given(data=st.data())
def test_random_tokens_stream_as_the_library_decodes_them(
    bundled: Tokenizer, smol: Tokenizer, data: st.DataObject
) -> None:
    tokenizer, vocab = data.draw(st.sampled_from([(bundled, 4096), (smol, 49152)]))
    ids = data.draw(st.lists(st.integers(0, vocab + 10), max_size=40))
    stream = TextStream(tokenizer)
    streamed = [stream.push(token_id) for token_id in ids]
    backend: Any = getattr(tokenizer, "_backend")  # noqa: B009 -- the oracle
    assert "".join(streamed) + stream.finish() == backend.decode(ids)


@given(text=st.text())
def test_a_text_streams_back_whole_and_never_in_half_characters(bundled: Tokenizer, text: str) -> None:
    stream = TextStream(bundled)
    streamed = [stream.push(token_id) for token_id in bundled.encode(text)]
    assert all("\ufffd" not in part for part in streamed) or "\ufffd" in text
    assert (stream.finish(), "".join(streamed)) == (
        "",
        text.replace("<s>", "").replace("</s>", "").replace("<pad>", ""),
    )


def test_half_a_character_at_the_end_is_shown_as_such(bundled: Tokenizer) -> None:
    ids = bundled.encode("🙂")[:-1]
    stream = TextStream(bundled)
    assert "".join(stream.push(token_id) for token_id in ids) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@given(text=st.text("abcdefgh é🙂", min_size=1))
def test_sentencepiece_texts_round_trip(text: str) -> None:
    backend = llama_2()
    tokenizer = Tokenizer(backend, eos_ids=frozenset())
    assert tokenizer.decode(tokenizer.encode(text)) == backend.decode(backend.encode(text).ids) == text


def test_after_a_prompt_the_first_space_is_text() -> None:
    tokenizer = Tokenizer(llama_2(), eos_ids=frozenset())
    ids = tokenizer.encode("abc")
    assert TextStream(tokenizer).push(ids[0]) == " a"
    assert TextStream(tokenizer, at_start=True).push(ids[0]) == "a"


def test_metaspace_is_read_as_spaces() -> None:
    backend = sentencepiece(decoders.Metaspace())
    assert Tokenizer(backend, eos_ids=frozenset()).decode(backend.encode("ab a").ids) == "ab a"
    kept = sentencepiece(decoders.Metaspace(prepend_scheme="never"))
    assert Tokenizer(kept, eos_ids=frozenset()).decode(kept.encode("ab a").ids) == " ab a"


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_first_token_loses_every_mark_of_metaspace_as_in_the_library(scheme: Any) -> None:
    backend: Any = sentencepiece(decoders.Metaspace(prepend_scheme=scheme))
    backend.add_tokens(["▁▁▁", "a▁b", "a b"])
    tokenizer = Tokenizer(backend, eos_ids=frozenset())
    for first in ("▁▁▁", "a▁b", "a b", "▁a", "<s>"):
        ids = [backend.token_to_id(piece) for piece in (first, "▁▁▁", "a▁b")]
        assert tokenizer.decode(ids) == backend.decode(ids)


@pytest.mark.parametrize(
    ("tokens", "ours", "library"),
    [
        (["<0xE2>", "<0x82>", "<0xAC>"], "€", "€"),
        (["<0xE2>", "<0x82>"], "\ufffd", "\ufffd\ufffd"),
        (["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>"], "€\ufffd", "\ufffd" * 4),
        (["<0x61>", "<0xFF>"], "a\ufffd", "\ufffd" * 2),
    ],
)
def test_a_run_of_byte_tokens_loses_only_what_is_no_character(
    tokens: list[str], ours: str, library: str
) -> None:
    """The one difference that `TextStream` names: what was whole has been shown."""
    backend: Any = llama_2()
    ids = [backend.token_to_id(piece) for piece in ["▁a", *tokens, "b"]]
    assert backend.decode(ids) == f"a{library}b"
    assert Tokenizer(backend, eos_ids=frozenset()).decode(ids) == f"a{ours}b"


def test_an_added_token_that_is_no_byte_level_piece_is_written_as_it_is(tiny_stories: Path) -> None:
    backend: Any = tokenizers.Tokenizer.from_file(str(tiny_stories / "tokenizer.json"))
    backend.add_tokens(["<think hard>", "…"])
    tokenizer = Tokenizer(backend, eos_ids=frozenset())
    ids = tokenizer.encode("a <think hard> b…")
    assert {4096, 4097} < set(ids)
    assert tokenizer.decode(ids) == backend.decode(ids) == "a <think hard> b…"


def test_a_decoder_that_needs_the_whole_sequence_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not know: .*WordPiece"):
        Tokenizer(sentencepiece(decoders.WordPiece()), eos_ids=frozenset())
    with pytest.raises(CheckpointError, match="has no decoder"):
        Tokenizer(tokenizers.Tokenizer(models.BPE()), eos_ids=frozenset())


def test_a_prompt_is_never_cut_to_the_length_of_the_training() -> None:
    backend: Any = llama_2()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    assert len(Tokenizer(backend, eos_ids=frozenset()).encode("abcdefgh" * 3)) == 24


def test_the_end_of_text_is_what_generate_would_stop_at(
    bundled: Tokenizer, tiny_stories: Path, tmp_path: Path
) -> None:
    assert bundled.eos_ids == {2}
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "copy"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_tokenizer(folder).eos_ids == {7, 9}
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert load_tokenizer(folder).eos_ids == {5}
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).eos_ids == {2}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert load_tokenizer(folder).eos_ids == {1}
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_ids == frozenset()


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The oracle: look at the whole text for the stop string that is complete first."""
    met = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(met)[1]], True) if met else (text, False)


@given(
    parts=st.lists(st.text("ab.\n", max_size=5), max_size=12),
    stops=st.lists(st.text("ab.\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_end_the_text_however_it_is_cut(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for part in parts:
        text, stopped = matcher.push(part)
        shown += text
    assert (shown + matcher.finish(), stopped) == cut_at_first_stop("".join(parts), stops)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for character in text:
        part, stopped = matcher.push(character)
        if stopped:
            return
        shown += part
    held = text[len(shown) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        StopMatcher(["\n", ""])
