"""Draws at the last hop: what a client without weights asks for, and what it gets instead of hidden states.

    client ──Open, tokens──> first hop ─ ─ hidden states ─ ─> last hop <──Open, draw── client
           ──token ids────────>                               │ head, draw
           <──Draws, and a signature over them───────────────'

Such a session's steps bring token ids to the first hop, which embeds them. The last hop draws a token for
each position that is to come back. Receipts are as in any other session: the first one names the embedded
rows as input, the last one names hidden states as output, which its hop keeps as evidence. What was drawn
from them is signed apart, together with the receipt and the terms: a token is a function of the three.
"""

from __future__ import annotations

import array
import sys
from typing import Annotated, Final, TypeAlias

import msgspec
from blake3 import blake3

from p2pinfer.errors import ConfigError, ProtocolViolation
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig, needs_ids
from p2pinfer.reputation.receipt import CheckSignature, Payload, Sign, digest_of

assert sys.byteorder == "little", "ids travel as they lie in memory"

DRAW_DOMAIN: Final = b"p2pinfer/1/draw\0"
ID_BYTES: Final = 4
MAX_LOGS: Final = 1024  # likeliest tokens of one position
_MOST_LOG: Final = 1e-3  # of a log probability: that of a certain token may be rounded upwards
MAX_RULES_BYTES: Final = 32 << 10

TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Seed: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Draw(msgspec.Struct, frozen=True, array_like=True):
    """Terms of a session's draws, by the names of `SamplingConfig` and `LogitsRules`."""

    seed: _Seed
    temperature: float
    top_p: float
    top_k: _Count
    min_p: float
    typical_p: float
    top_h: float
    epsilon_cutoff: float
    eta_cutoff: float
    rules: Annotated[bytes, msgspec.Meta(max_length=MAX_RULES_BYTES)]  # msgpack of the rules; empty: none
    prompt_tokens: _Count
    max_ids: _Count  # the text's greatest length, the prompt counted
    eos_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=256)]
    # how many of the likeliest tokens' log probabilities come with each token; None: not even its own
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGS)] | None = None

    def sampling(self) -> SamplingConfig:
        """The settings of the draw; ConfigError if they make no sense."""
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            min_p=self.min_p,
            typical_p=self.typical_p,
            top_h=self.top_h,
            epsilon_cutoff=self.epsilon_cutoff,
            eta_cutoff=self.eta_cutoff,
        )

    def logits_rules(self) -> LogitsRules:
        """The rules that change logits.

        Raises:
            ConfigError: They make no sense, or need the text's tokens, which no hop but the first one sees.
        """
        try:
            rules = _rules_decoder.decode(self.rules) if self.rules else LogitsRules()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as exc:
            raise ConfigError("the rules of a draw cannot be read") from exc
        if name := needs_ids(rules):
            raise ConfigError(f"{name} looks at the text's tokens, which a last hop does not see")
        return rules


class Log(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position: that of the drawn token, and the likeliest tokens with theirs."""

    token: float
    likeliest: tuple[tuple[TokenId, float], ...] = ()


class Draws(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that were drawn at adjacent positions, and their log probabilities if those were asked for."""

    ids: tuple[TokenId, ...]
    logs: tuple[Log, ...] = ()


_encoder: Final = msgspec.msgpack.Encoder()
_rules_decoder: Final = msgspec.msgpack.Decoder(LogitsRules)
_draws_decoder: Final = msgspec.msgpack.Decoder(Draws)


def draw_of(
    sampling: SamplingConfig,
    rules: LogitsRules,
    *,
    prompt_tokens: int,
    max_ids: int,
    eos_ids: tuple[int, ...],
    logprobs: int | None = None,
) -> Draw:
    """Terms for draws by these settings, whose seed is given."""
    assert sampling.seed is not None
    return Draw(
        sampling.seed,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.min_p,
        sampling.typical_p,
        sampling.top_h,
        sampling.epsilon_cutoff,
        sampling.eta_cutoff,
        b"" if rules == LogitsRules() else _encoder.encode(rules),
        prompt_tokens,
        max_ids,
        eos_ids,
        logprobs,
    )


def digest_of_terms(draw: Draw) -> bytes:
    """The 32 bytes by which a signature names the terms of draws."""
    return blake3(_encoder.encode(draw)).digest()


def encode_ids(token_ids: tuple[int, ...]) -> bytes:
    """Token ids as they travel: u32, little-endian."""
    return array.array("I", token_ids).tobytes()


def decode_ids(payload: Payload, tokens: int, vocab_size: int, peer_id: str = "") -> array.array[int]:
    """The `tokens` ids in a payload.

    Raises:
        ProtocolViolation: There are more or fewer, or one that the model does not have.
    """
    if len(payload) != tokens * ID_BYTES:
        raise ProtocolViolation(f"{len(payload)} bytes for the ids of {tokens} tokens", peer_id)
    ids = array.array("I", bytes(payload))
    if ids and max(ids) >= vocab_size:
        raise ProtocolViolation(f"token {max(ids)} of a model that has {vocab_size}", peer_id)
    return ids


def encode_draws(draws: Draws) -> bytes:
    """Draws as they travel."""
    return _encoder.encode(draws)


def decode_draws(
    payload: Payload, tokens: int, vocab_size: int, peer_id: str = "", *, logprobs: int | None = None
) -> Draws:
    """The draws in the payload of a result for `tokens` positions.

    Args:
        logprobs: Of how many of the likeliest tokens log probabilities were asked for; None: of none at all.

    Raises:
        ProtocolViolation: They are of another number of positions, or of tokens that the model does not have,
            or lack log probabilities that were asked for.
    """
    if not tokens and not payload:
        return Draws(())
    try:
        draws = _draws_decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:  # which may quote the peer
        raise ProtocolViolation("what should be draws is none", peer_id) from exc
    named = (*draws.ids, *(token_id for log in draws.logs for token_id, _ in log.likeliest))
    said = [log.token for log in draws.logs] + [each for log in draws.logs for _, each in log.likeliest]
    if not all(each <= _MOST_LOG for each in said):  # nor is one that is no number
        raise ProtocolViolation("a log probability that there is not", peer_id)
    if len(draws.ids) != tokens or len(draws.logs) not in (0, tokens) or max(named, default=0) >= vocab_size:
        raise ProtocolViolation("draws of other positions, or of tokens that there are not", peer_id)
    due = None if logprobs is None else min(logprobs, vocab_size)
    if due is not None and [len(log.likeliest) for log in draws.logs] != [due] * tokens:
        raise ProtocolViolation("draws without the log probabilities that were asked for", peer_id)
    return draws


def sign_draws(draw: Draw, receipt_digest: bytes, payload: Payload, sign: Sign) -> bytes:
    """The last hop's signature: for these terms, what the receipt names as output gave this payload."""
    return sign(_statement(draw, receipt_digest, payload))


def are_signed_draws(
    draw: Draw, receipt: Payload, payload: Payload, signature: bytes, peer_id: str, check: CheckSignature
) -> bool:
    """True if `peer_id` signed for these draws with this receipt of its own."""
    return check(peer_id, _statement(draw, digest_of(receipt), payload), signature)


def _statement(draw: Draw, receipt_digest: bytes, payload: Payload) -> bytes:
    return DRAW_DOMAIN + receipt_digest + digest_of_terms(draw) + digest_of(payload)
