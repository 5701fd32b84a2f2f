"""`p2pinfer plan`: memory, traffic and speed to expect of a swarm before anybody joins it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from p2pinfer.cli.completing import complete_value
from p2pinfer.cli.invocation import WEIGHTS, Invocation, command
from p2pinfer.cli.output.terminal import note, print_out, write_out
from p2pinfer.cli.quantities import parse_rate, parse_size
from p2pinfer.errors import ConfigError, LocalError

if TYPE_CHECKING:
    from p2pinfer.models.checkpoint.spec import ModelSpec
    from p2pinfer.models.numerics import Numerics

_CONTEXT = 4096  # tokens, or as many as the model takes


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return complete_value("ID_OR_DIR", ctx, param, incomplete)


@command(
    "plan",
    examples=[
        "p2pinfer plan meta-llama/Llama-3.3-70B-Instruct --peers 8 --up 20Mbit",
        "p2pinfer plan Qwen/Qwen3-8B --peers 2,4,8 --rtt 20 --weights int4",
        "p2pinfer plan ./my-model --peers 4 --memory 16GiB --read-rate 50GB/s",
        "p2pinfer plan Qwen/Qwen3-32B --peers 6 --json | jq '.plans[].tokens_per_s'",
    ],
)
@click.argument("model", metavar="MODEL", shell_complete=_complete)
@click.option("--peers", metavar="N[,N...]", default="4,8,16", help="Numbers of peers. [default: 4,8,16]")
@click.option("--up", metavar="RATE", help="Upload of each peer, such as 20Mbit. [default: 20Mbit]")
@click.option("--rtt", metavar="MS", type=float, help="Round trip between any two. [default: 100]")
@click.option("--memory", metavar="SIZE", help="Free memory of each peer, such as 16GiB.")
@click.option(
    "--read-rate",
    metavar="RATE",
    help="Rate at which each peer reads its weights, such as 50GB/s. [default: as measured here]",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    metavar="FORMAT",
    default="auto",
    help=f"What peers hold weights as: {', '.join(WEIGHTS)}. [default: auto, as they are]",
)
@click.option(
    "--context", metavar="N", type=int, help=f"Tokens of a text, for the cache. [default: {_CONTEXT}]"
)
@click.option("--prompt", metavar="N", type=int, default=1000, help="Tokens of its prompt. [default: 1000]")
def plan(
    call: Invocation,
    model: str,
    peers: str,
    up: str | None,
    rtt: float | None,
    memory: str | None,
    read_rate: str | None,
    weights: str,
    context: int | None,
    prompt: int,
) -> None:
    """Show memory, traffic and speed to expect of a swarm that serves MODEL.

    MODEL is a Hugging Face id, a folder, a GGUF file or a config.json. No weights are read or fetched.

    Every peer is taken to be alike. The speed is the one that the planner of routes predicts, for one text
    without guesses.
    """
    from p2pinfer.config import SharedConfig
    from p2pinfer.planning.described_model import describe_model
    from p2pinfer.planning.forecast import Assumed, fewest_peers, forecast
    from p2pinfer.routing.config import RoutingConfig

    shared = call.settings().build(SharedConfig)
    usual = RoutingConfig()
    counts = _counts(peers)
    up_bytes_per_s = usual.bandwidth_bytes_per_s if up is None else parse_rate(up, "--up")
    room = None if memory is None else parse_size(memory, "--memory")
    spec = describe_model(model, cache_dir=shared.cache_dir)
    numerics = _numerics(spec, weights)
    block_s = _block_s(call, spec, numerics, weights, read_rate)
    tokens = min(spec.max_positions, _CONTEXT) if context is None else context
    try:
        found = [
            forecast(
                spec,
                Assumed(
                    count,
                    numerics,
                    block_s,
                    up_bytes_per_s,
                    usual.default_rtt_ms if rtt is None else rtt,
                    tokens,
                    prompt,
                ),
                usual,
            )
            for count in counts
        ]
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    least = None if room is None else fewest_peers(spec, numerics, tokens, room)
    from p2pinfer.cli.output.plan_table import draw_plan, plan_document

    if call.json:
        write_out(json.dumps(plan_document(spec, numerics, found, room, least)) + "\n")
    else:
        print_out(draw_plan(spec, numerics, found, room, least))


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or len(counts) > 16:
        raise ConfigError(f"--peers {text}: write one number, or up to 16 with commas: 4,8,16")
    return counts


def _numerics(spec: ModelSpec, weights: str) -> Numerics:
    from p2pinfer.models.numerics import Numerics

    return spec.numerics if weights == "auto" else Numerics(weights, "bfloat16")


def _block_s(
    call: Invocation, spec: ModelSpec, numerics: Numerics, weights: str, read_rate: str | None
) -> float:
    """Seconds of a token in a block: as measured here by what a node does before it joins, or by a rate."""
    if read_rate is not None:
        return spec.block_bytes(numerics) / parse_rate(read_rate, "--read-rate")
    if call.is_for_people and not call.json:
        note("measuring how fast this computer reads a block; --read-rate says it of others ...")
    from p2pinfer.models.config import ComputeConfig
    from p2pinfer.node.serve.capacity import measure_capacity  # and torch, which takes seconds

    try:
        measured = measure_capacity(spec, ComputeConfig(weights=weights))
    except ConfigError:
        raise
    except LocalError as exc:
        raise LocalError(f"{exc}; or give the peers' speed by --read-rate, such as 50GB/s") from exc
    return 1 / measured.tokens_per_s_per_block
