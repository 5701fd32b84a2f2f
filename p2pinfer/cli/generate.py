"""`p2pinfer generate`: text from the swarm, as it comes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from p2pinfer.errors import ConfigError

from .invocation import BOOTSTRAP, DATA_DIR, MODEL, Invocation, command, setting
from .terminal import print_note, write_out

if TYPE_CHECKING:
    from p2pinfer.generate import Generation, GenerationResult

POLICIES = ("risk-adjusted", "fastest", "spread", "trusted-only")


@command(
    "generate",
    examples=[
        'p2pinfer generate "Once upon a time"',
        'p2pinfer generate --temperature 0.8 --seed 7 --stats "The little fox"',
        "cat prompt.txt | p2pinfer generate --json -",
        'p2pinfer generate --policy my_module:MyPolicy "Once upon a time"',
    ],
)
@click.argument("prompt")
@MODEL
@setting("generation.max_new_tokens", "--max-new-tokens N", "Stop after N tokens. [default: 128]")
@setting("generation.temperature", "--temperature T", "0 takes the likeliest token. [default: 0.0]")
@setting("generation.top_p", "--top-p P", "Draw among the likeliest, together P. [default: 1.0]")
@setting("generation.top_k", "--top-k K", "Draw among the K likeliest; 0: all. [default: 0]")
@setting("generation.seed", "--seed S", "Draw the same every time. [default: none]")
@setting("generation.stop", "--stop TEXT", "End before this text; may be repeated.", multiple=True)
@BOOTSTRAP
@setting(
    "client.policy",
    "--policy POLICY",
    "Who chooses peers: a built-in policy or module:Class. [default: risk-adjusted]",
    choices=POLICIES,
)
@DATA_DIR
@click.option("--echo", is_flag=True, help="Print the prompt before the text.")
@click.option("--stats", is_flag=True, help="Print the route and its times afterwards.")
def generate(call: Invocation, prompt: str, echo: bool, stats: bool) -> None:
    """Continue PROMPT on the swarm, and print the text as it comes.

    PROMPT - is read from standard input. With no swarm in reach, the bundled model runs on three nodes that
    are started on this computer and end with the text.
    """
    from p2pinfer.client import Client, ClientConfig  # what follows takes seconds to import: torch, libp2p
    from p2pinfer.config import SharedConfig
    from p2pinfer.embedded import client_host_config, may_embed, swarm_in_reach
    from p2pinfer.generate import GenerationConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.routing.config import RoutingConfig
    from p2pinfer.session import SessionConfig

    from .progress import Bars, NodesStarting
    from .render import route_table
    from .running import run

    settings = call.settings(GenerationConfig, ClientConfig, SessionConfig, RoutingConfig, HostConfig)
    text = _read_stdin() if prompt == "-" else prompt

    async def main() -> None:
        shared = settings.build(SharedConfig)
        embedding = may_embed(shared.model, shared.bootstrap)
        client = Client(
            **settings.shared(),
            config=settings.build(ClientConfig),
            host_config=client_host_config(settings.build(HostConfig), embedding=embedding),
            session_config=settings.build(SessionConfig),
            routing_config=settings.build(RoutingConfig),
            progress=Bars(quiet=call.quiet),
        )
        with NodesStarting(quiet=call.quiet) as starting:
            async with client:
                # Before any node is started: nobody should wait for nodes to hear that a prompt is too long.
                generation = client.generate(text, settings.build(GenerationConfig))
                async with swarm_in_reach(client, embedding=embedding, on_embedding=starting):
                    await _stream(generation, before=text if echo else "", silent=call.json)
                    if call.json:
                        write_out(json.dumps(to_dict(generation.result), ensure_ascii=False) + "\n")
                    if stats:
                        print_note(route_table(generation.result))

    run(main)


async def _stream(generation: Generation, *, before: str, silent: bool) -> None:
    """Print the tokens as they come. The line is ended also when the generation fails."""
    begun = False
    try:
        async for token in generation:
            if token.text and not silent:
                write_out(token.text if begun else before + token.text)
                begun = True
    finally:
        if begun:
            write_out("\n")


def to_dict(result: GenerationResult) -> dict[str, object]:
    """The result as `--json` prints it."""
    timings = result.timings
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "route": [
            {"peer_id": hop.peer_id, "blocks": [hop.span.start, hop.span.stop], "connection": hop.connection}
            for hop in result.route
        ],
        "timings": {
            "first_token_s": timings.first_token_s,
            "tokens_per_s": timings.tokens_per_s,
            "per_hop_ms": list(timings.per_hop_ms),
        },
        "failovers": result.failovers,
    }


def _read_stdin() -> str:
    """The prompt from standard input, less the line end that `echo` and editors add.

    Raises:
        ConfigError: It is not UTF-8.
    """
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the prompt on standard input is not UTF-8 text: {exc}") from exc
