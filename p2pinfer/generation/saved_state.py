"""Saved state of a generation as a resume token, for another process or a later day.

The token is text and holds everything: the model's revision, how tokens are drawn, the seed, and all ids so
far. The text so far is not in it, since it follows from the ids. A long prompt makes a long token, so one can
be kept in the data directory, and is then called by a short name.

    token = "p2pr2." + base64url(checksum + zlib(msgpack(state)))

Tokens of before begin with p2pr1 and hold the first ten fields; they are read as well.

Whoever hands a token over is not trusted: sizes are bounded before memory is taken, every field has its type
and range, and what the model cannot have said is refused by `check_state`.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from blake3 import blake3

from p2pinfer.errors import ConfigError, LocalError
from p2pinfer.folders import make_private, write_private
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.sampling_config import MAX_GRAMMAR_CHARS, LogitsRules

PREFIX: Final = "p2pr2."
_PREFIXES: Final = (PREFIX, "p2pr1.")
MAX_STATE_BYTES: Final = 16 << 20  # 3 million ids
MAX_TOKEN_CHARS: Final = 24 << 20  # base64 of that
MORE_TOKENS: Final = 128  # of a text that was at its last one, where nobody says how many
MAX_KEPT: Final = 32  # the oldest go first
_CHECKSUM_BYTES: Final = 8
_NAME: Final = re.compile(r"[0-9a-f]{8}")

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class GenerationState(msgspec.Struct, frozen=True, array_like=True):
    """Everything that decides how a generation goes on. `token_ids` are those that follow the prompt."""

    model: Annotated[str, msgspec.Meta(max_length=1024)]  # for people
    revision: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    prompt_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1)]
    max_new_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
    temperature: float
    top_p: float
    top_k: int
    seed: int  # also where the user gave none
    stop: tuple[str, ...] = ()
    token_ids: tuple[TokenId, ...] = ()
    eos_ids: tuple[TokenId, ...] | None = None  # None: those of the tokenizer
    stop_ids: tuple[TokenId, ...] = ()
    show_special: bool = False
    min_p: float = 0.0
    typical_p: float = 1.0
    top_h: float = 0.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    rules: LogitsRules = LogitsRules()
    grammar: Annotated[str, msgspec.Meta(max_length=MAX_GRAMMAR_CHARS)] = (
        ""  # that the text follows; empty: none
    )
    # How many positions travelled packed, for which they were rounded, so that they do again; None: not begun
    packed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] | None = None


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(GenerationState)


def encode_state(state: GenerationState) -> str:
    """The state as a resume token: one line of letters, digits, `-`, `_` and a dot."""
    body = zlib.compress(_encoder.encode(state), 9)
    return PREFIX + base64.urlsafe_b64encode(_checksum(body) + body).decode("ascii").rstrip("=")


def decode_state(token: str) -> GenerationState:
    """The state in a resume token.

    Raises:
        ConfigError: It is no such token, of a version this program does not know, or damaged.
    """
    prefix, text = token[: len(PREFIX)], token[len(PREFIX) :]
    if prefix not in _PREFIXES or len(token) > MAX_TOKEN_CHARS:
        raise ConfigError(
            f"this is not a resume token of this version of p2pinfer; those begin with {PREFIX}"
        )
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        checksum, body = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if checksum != _checksum(body):
            raise ValueError("the checksum is wrong")
        inflater = zlib.decompressobj()
        encoded = inflater.decompress(body, MAX_STATE_BYTES)
        if not inflater.eof or inflater.unused_data:
            raise ValueError("it is too large")
        return _decoder.decode(encoded)
    except (ValueError, binascii.Error, zlib.error, msgspec.MsgspecError, RecursionError) as exc:
        raise ConfigError("the resume token is cut short or damaged; copy all of it") from exc


def check_state(state: GenerationState, spec: ModelSpec) -> None:
    """Nothing, if `spec`'s model can go on from there.

    Raises:
        ConfigError: The state is another model's, or holds what this one could not have said.
    """
    if state.revision != spec.revision:
        raise ConfigError(
            f"the resume token is of {state.model} ({state.revision}), and this is {spec.model} "
            f"({spec.revision}): only the same weights give the same text; name them by --model"
        )
    length = len(state.prompt_ids) + state.max_new_tokens
    if (
        max((*state.prompt_ids, *state.token_ids)) >= spec.vocab_size
        or length > spec.max_positions
        or len(state.token_ids) > state.max_new_tokens
    ):
        raise ConfigError(f"the resume token holds what {spec.model} cannot have said")


def extend_state(state: GenerationState, more: int | None, max_positions: int) -> GenerationState:
    """`state` with `more` tokens to come; with None as many as were left, or `MORE_TOKENS` if none were.

    As far as the model's context of `max_positions` tokens has room. How the tokens are drawn stays as it is.
    """
    if more is None and len(state.token_ids) < state.max_new_tokens:
        return state
    wanted = len(state.token_ids) + (MORE_TOKENS if more is None else more)
    room = max(max_positions - len(state.prompt_ids), 1)
    return msgspec.structs.replace(state, max_new_tokens=min(wanted, room))


def keep_token(token: str, data_dir: Path) -> str:
    """Keep a token in the data directory, readable by its owner alone; returns the name it goes by.

    Raises:
        LocalError: It cannot be written.
    """
    folder = _folder(data_dir)
    name = blake3(token.encode()).hexdigest()[:8]
    try:
        make_private(data_dir)
        make_private(folder)
        write_private(folder / name, token.encode(), durable=True)
        _drop_oldest(folder, but=name)
    except OSError as exc:
        raise LocalError(f"cannot save a resume token in {folder}: {exc.strerror or exc}") from exc
    return name


def find_token(text: str, data_dir: Path) -> str:
    """The token that `text` is, or is the name of.

    Raises:
        ConfigError: None of that name is kept here, or it cannot be read.
    """
    if text.startswith(_PREFIXES):
        return text
    path = _folder(data_dir) / text
    if not _NAME.fullmatch(text) or not path.is_file():
        raise ConfigError(f"there is no saved generation {text!r} in {_folder(data_dir)}")
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return file.read(MAX_TOKEN_CHARS + 1)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def drop_token(text: str, data_dir: Path) -> None:
    """Forget a token that was kept under this name, if there is one."""
    if _NAME.fullmatch(text):
        (_folder(data_dir) / text).unlink(missing_ok=True)


def _folder(data_dir: Path) -> Path:
    return data_dir / "resume"


def _drop_oldest(folder: Path, but: str) -> None:
    """Make room, but not of what was just kept: where the clock has been set back, it seems the oldest."""
    kept = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.name != but]
    kept.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in kept[: 1 - MAX_KEPT]:
        path.unlink(missing_ok=True)


def _checksum(body: bytes) -> bytes:
    return blake3(b"p2pinfer/1/resume\0" + body).digest(length=_CHECKSUM_BYTES)
