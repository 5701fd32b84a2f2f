"""How good the guesses are, on texts that were held out."""

from __future__ import annotations

import torch
from torch import Tensor

from .llama import Llama
from .settings import Settings
from .writing import TEMPERATURES

_DEPTH = 8  # guesses a trip
_AT_A_TIME = 16  # rows


@torch.inference_mode()
def judge(target: Llama, drafter: Llama, rows: Tensor, settings: Settings) -> None:
    """Print, by temperature of the draws: share of equal tokens, and tokens a trip with eight guesses."""
    for heat in sorted(set(TEMPERATURES)):
        chosen = [i for i in range(len(rows)) if TEMPERATURES[i % len(TEMPERATURES)] == heat]
        if not chosen:
            continue
        same = torch.cat(
            [
                same_choices(target, drafter, rows[chosen[i : i + _AT_A_TIME]].long(), heat)
                for i in range(0, len(chosen), _AT_A_TIME)
            ]
        )
        begin = same[:, :300]  # of greedy texts the part before the loop that many end in
        print(
            f"temperature {heat:g}: {begin.float().mean():.3f} of the tokens the same, "
            f"{tokens_a_trip(begin):.2f} a trip with {_DEPTH} guesses ({len(chosen)} rows, the first 300)",
            flush=True,
        )


def same_choices(target: Llama, drafter: Llama, ids: Tensor, heat: float) -> Tensor:
    """True where both choose the same token with the same noise, (rows, tokens)."""
    wanted, given = target(ids).float(), drafter(ids).float()
    noise = heat * -torch.empty_like(wanted).exponential_().log()
    return (wanted + noise).argmax(-1) == (given + noise).argmax(-1)


def tokens_a_trip(same: Tensor) -> float:
    """Tokens for each trip, if every trip carries `_DEPTH` guesses and ends with the first wrong one."""
    tokens = trips = 0
    for row in same.tolist():
        at = 0
        while at < len(row):
            run = 0
            while run < _DEPTH and at + 1 + run < len(row) and row[at + 1 + run]:
                run += 1
            at, trips = at + run + 1, trips + 1
        tokens += len(row)
    return tokens / trips
