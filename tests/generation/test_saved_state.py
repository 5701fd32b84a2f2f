"""Resume tokens: what they hold, what they refuse, and where they are kept."""

from __future__ import annotations

import base64
import os
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ConfigError, LocalError
from p2pinfer.generation import saved_state
from p2pinfer.generation.saved_state import (
    MAX_KEPT,
    PREFIX,
    GenerationState,
    check_state,
    decode_state,
    drop_token,
    encode_state,
    find_token,
    keep_token,
)
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.sampling_config import LogitsRules

REVISION = "ab" * 16
SPEC = ModelSpec("tiny", REVISION, "llama", "float32", 8, 320, 4096, 1024, 4, 64, 1000)
STATE = GenerationState("tiny", REVISION, (1, 2, 3), 20, 0.8, 0.9, 40, 7, ("The end",), (4, 5))

ids = st.lists(st.integers(0, (1 << 32) - 1), max_size=50).map(tuple)
states = st.builds(
    GenerationState,
    model=st.text(max_size=50),
    revision=st.just(REVISION),
    prompt_ids=ids.filter(bool),
    max_new_tokens=st.integers(1, 1 << 20),
    temperature=st.floats(0, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 100),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
    token_ids=ids,
    eos_ids=st.none() | ids,
    stop_ids=ids,
    show_special=st.booleans(),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.1, 1),
    rules=st.builds(
        LogitsRules,
        sequence_bias=st.lists(
            st.tuples(ids.filter(bool), st.floats(max_value=100, allow_nan=False)), max_size=3
        ).map(tuple),
        repetition_penalty=st.floats(0.1, 5),
        bad_words_ids=st.lists(ids, max_size=3).map(tuple),
        exponential_decay_length_penalty=st.none() | st.tuples(st.integers(0, 9), st.floats(1, 2)),
    ),
)


def changed(**changes: Any) -> GenerationState:
    return msgspec.structs.replace(STATE, **changes)


@given(states)
def test_a_token_holds_the_whole_state(state: GenerationState) -> None:
    token = encode_state(state)
    assert decode_state(token) == state
    assert token.startswith(PREFIX)
    assert token.isascii()
    assert not token.split()[1:]


@given(states, st.data())
def test_a_token_that_lost_or_changed_a_character_is_refused(
    state: GenerationState, data: st.DataObject
) -> None:
    token = encode_state(state)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from("Aa0_-.= é").filter(lambda each: each != token[at]))
    for bitten in (token[:at] + token[at + 1 :], token[:at] + other + token[at + 1 :], token[:at]):
        try:
            # The last character of base64 may carry bits that mean nothing.
            assert decode_state(bitten) == state
            assert at == len(token) - 1
        except ConfigError:
            pass


@given(st.text(max_size=100) | st.text(max_size=100).map(PREFIX.__add__))
def test_garbage_is_no_token(text: str) -> None:
    with pytest.raises(ConfigError, match="resume token"):
        decode_state(text)


def forged(encoded: bytes) -> str:
    """A token with a right checksum, as anybody can make one."""
    body = zlib.compress(encoded)
    checksum = blake3(b"p2pinfer/1/resume\0" + body).digest(length=8)
    return PREFIX + base64.urlsafe_b64encode(checksum + body).decode().rstrip("=")


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": "AB" * 16},
        {"prompt_ids": ()},
        {"prompt_ids": (-1,)},
        {"token_ids": (1 << 32,)},
        {"token_ids": ("1",)},
        {"max_new_tokens": 0},
        {"temperature": "hot"},
        {"seed": 1.5},
        {"stop": "The end"},
        {"model": "m" * 2000},
    ],
)
def test_a_field_out_of_its_range_is_refused(changes: dict[str, Any]) -> None:
    encoded = msgspec.msgpack.encode(changed(**changes))
    with pytest.raises(ConfigError, match="damaged"):
        decode_state(forged(encoded))
    assert decode_state(forged(msgspec.msgpack.encode(STATE))) == STATE


def test_a_token_that_would_swell_is_refused_before_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_state, "MAX_STATE_BYTES", 10_000)
    with pytest.raises(ConfigError, match="damaged"):
        decode_state(encode_state(changed(prompt_ids=(7,) * 20_000)))
    monkeypatch.setattr(saved_state, "MAX_TOKEN_CHARS", 100)
    with pytest.raises(ConfigError, match="not a resume token"):
        decode_state(encode_state(changed(stop=(os.urandom(100).hex(),))))


def test_a_token_of_a_later_version_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match="of this version"):
        decode_state(encode_state(STATE).replace(PREFIX, "p2pr3."))


def test_a_token_of_an_earlier_version_goes_on_as_it_began() -> None:
    """It holds ten fields; what it could not say is as it was then."""
    fields = msgspec.to_builtins(STATE)[:10]
    token = forged(msgspec.msgpack.encode(fields)).replace(PREFIX, "p2pr1.")
    assert decode_state(token) == STATE
    assert STATE.rules == LogitsRules()
    assert STATE.eos_ids is None


def test_a_rule_that_makes_no_sense_is_refused() -> None:
    fields = msgspec.to_builtins(changed(rules=LogitsRules(repetition_penalty=2.0)))
    fields[GenerationState.__struct_fields__.index("rules")]["repetition_penalty"] = -2.0
    with pytest.raises(ConfigError, match="repetition_penalty is -2"):
        decode_state(forged(msgspec.msgpack.encode(fields)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "cd" * 16}, "only the same weights give the same text"),
        ({"prompt_ids": (4096,)}, "cannot have said"),
        ({"token_ids": (4096,)}, "cannot have said"),
        ({"max_new_tokens": 1022}, "cannot have said"),
        ({"max_new_tokens": 1}, "cannot have said"),
    ],
)
def test_a_state_that_the_model_cannot_go_on_from_is_refused(changes: dict[str, Any], message: str) -> None:
    check_state(STATE, SPEC)
    with pytest.raises(ConfigError, match=message):
        check_state(changed(**changes), SPEC)


def test_a_token_is_kept_for_its_owner_alone_and_found_by_name(tmp_path: Path) -> None:
    token = encode_state(STATE)
    name = keep_token(token, tmp_path)
    assert keep_token(token, tmp_path) == name
    path = tmp_path / "resume" / name
    assert path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in path.parent.iterdir()] == [name]
    assert find_token(name, tmp_path) == find_token(token, tmp_path) == token
    drop_token(name, tmp_path)
    drop_token(name, tmp_path)
    drop_token("../resume", tmp_path)
    with pytest.raises(ConfigError, match=f"there is no saved generation '{name}'"):
        find_token(name, tmp_path)


@pytest.mark.parametrize("name", ["", "../identity.key", "ABCDEF01", "0123456", "."])
def test_a_name_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    (tmp_path / "identity.key").write_text("secret")
    with pytest.raises(ConfigError, match="there is no saved generation"):
        find_token(name, tmp_path)


def test_a_token_that_is_kept_after_the_clock_was_set_back_stays(tmp_path: Path) -> None:
    for seed in range(MAX_KEPT):
        name = keep_token(encode_state(changed(seed=seed)), tmp_path)
        os.utime(tmp_path / "resume" / name, (4e9, 4e9))  # by a clock that was years ahead
    latest = keep_token(encode_state(changed(seed=MAX_KEPT)), tmp_path)
    assert find_token(latest, tmp_path)
    assert len(list((tmp_path / "resume").iterdir())) == MAX_KEPT


def test_the_oldest_tokens_go(tmp_path: Path) -> None:
    names = [keep_token(encode_state(changed(seed=seed)), tmp_path) for seed in range(MAX_KEPT + 3)]
    left = {path.name for path in (tmp_path / "resume").iterdir()}
    assert left == set(names[3:])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "resume").write_text("a file in the way")
    with pytest.raises(LocalError, match="cannot save a resume token in"):
        keep_token("token", tmp_path)
