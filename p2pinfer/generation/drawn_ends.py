"""Embedding and head at the hops: token ids go in, and tokens that the last hop drew come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from p2pinfer.errors import ConfigError
from p2pinfer.models.text.log_probabilities import LogProbabilities
from p2pinfer.models.text.sampling_config import needs_ids
from p2pinfer.node.protocol.draws import Draw, Draws, draw_of

from .first_state import sampling_of
from .saved_state import GenerationState
from .transcript import Transcript


class Drawn(NamedTuple):
    """A token that was drawn, and log probabilities if they were asked for."""

    token_id: int
    logs: LogProbabilities | None


class DrawnEnds:
    """Ends of one text; see `Ends`. Its outputs are draws."""

    def embed(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids themselves."""
        return tuple(token_ids)

    def split(self, outputs: Draws) -> Sequence[Drawn]:
        """A draw each."""
        if not outputs.logs:
            return [Drawn(token_id, None) for token_id in outputs.ids]
        logs = (LogProbabilities(each.token, each.likeliest) for each in outputs.logs)
        return [Drawn(token_id, each) for token_id, each in zip(outputs.ids, logs, strict=True)]

    def draw(self, output: Drawn, ids: Sequence[int]) -> tuple[int, LogProbabilities | None]:
        """See `Ends`: what was drawn behind `ids`."""
        return output


def terms_of_draws(state: GenerationState, transcript: Transcript, logprobs: int | None) -> Draw:
    """Terms by which a last hop draws the tokens of a generation.

    Raises:
        ConfigError: It cannot, since it sees neither the text nor a grammar.
    """
    name = "grammar" if state.grammar else needs_ids(state.rules)
    if name:
        raise ConfigError(
            f"{name} looks at the text, which the last hop of a client without weights does not see; "
            "leave out --thin, or this setting"
        )
    return draw_of(
        sampling_of(state),
        state.rules,
        prompt_tokens=len(state.prompt_ids),
        max_ids=transcript.max_ids,
        eos_ids=tuple(sorted(transcript.eos_ids)),
        logprobs=logprobs,
    )
