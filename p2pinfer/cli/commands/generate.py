"""`p2pinfer generate`: text from the swarm, as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pinfer.cli.invocation import (
    ALLOW,
    BOOTSTRAP,
    DATA_DIR,
    DENY,
    IDENTITY,
    MODEL,
    SWARM_KEY,
    Invocation,
    command,
    setting,
)
from p2pinfer.cli.output.terminal import note, print_note, write_out
from p2pinfer.cli.output.waiting import WaitingLine
from p2pinfer.errors import ConfigError

from .interrupted_text import kept, result_line
from .many_prompts import AT_ONCE, generate_all, read_prompts
from .prompt import as_prompt, dash_hint, take_prompt

if TYPE_CHECKING:
    from p2pinfer.generation.generation import Generation, GenerationResult
    from p2pinfer.generation.outage import Waiting

POLICIES = ("risk-adjusted", "fastest", "spread", "trusted-only")
POLICY = setting(
    "client.policy",
    "--policy POLICY",
    f"Routing policy: {', '.join(POLICIES)}, or module:Class. [default: risk-adjusted]",
    choices=POLICIES,
)


@command(
    "generate",
    examples=[
        'p2pinfer generate "Once upon a time"',
        'p2pinfer generate --system "Answer in one word." "What is the capital of France?"',
        'p2pinfer generate --temperature 0.8 --seed 7 --stats "The little fox"',
        "cat prompt.txt | p2pinfer generate --json -",
        "p2pinfer generate --prompts prompts.jsonl --json > texts.jsonl",
        'p2pinfer generate --policy my_module:MyPolicy "Once upon a time"',
        'p2pinfer generate --adapter my-adapter "Once upon a time"',
        "p2pinfer generate --resume 1f9c2a7b",
        "p2pinfer generate -- '-5 degrees'",
    ],
    hint=dash_hint,
)
@click.argument("prompt", required=False)
@MODEL
@setting("generation.max_new_tokens", "--max-new-tokens N", "Stop after N tokens. [default: model's, or 128]")
@setting(
    "generation.temperature", "--temperature T", "Sampling temperature; 0: greedy. [default: model's, or 0]"
)
@setting(
    "generation.top_p",
    "--top-p P",
    "Sample from the likeliest tokens with total probability P. [default: model's, or 1]",
)
@setting(
    "generation.top_k", "--top-k K", "Sample from the K likeliest tokens; 0: all. [default: model's, or 0]"
)
@setting(
    "generation.min_p",
    "--min-p P",
    "Sample only tokens at least P times as probable as the likeliest. [default: model's, or 0]",
)
@setting("generation.seed", "--seed S", "Random seed; the same seed repeats a text. [default: none]")
@setting(
    "generation.repetition_penalty",
    "--repetition-penalty X",
    "Values above 1 make repeated tokens less likely. [default: model's, or 1]",
)
@setting(
    "generation.logit_bias",
    "--logit-bias ID=BIAS",
    "Add BIAS to the logit of token ID; -inf forbids the token. May be repeated.",
    multiple=True,
)
@setting(
    "generation.stop",
    "--stop TEXT",
    "Stop before this text, which may contain special tokens. May be repeated.",
    multiple=True,
)
@setting("generation.stop_ids", "--stop-id ID", "Stop before this token. May be repeated.", multiple=True)
@setting("generation.show_special", "--show-special", "Print special tokens too.")
@click.option(
    "--chat/--raw",
    "as_chat",
    default=None,
    help="Send PROMPT as a message, by the model's chat template, or as it is. [default: --chat for models "
    "that have a template]",
)
@click.option("--system", metavar="TEXT", help="System message of the chat, before PROMPT.")
@BOOTSTRAP
@SWARM_KEY
@ALLOW
@DENY
@IDENTITY
@setting(
    "audit.rate",
    "--audit-rate SHARE",
    "Share of hops to audit, 0 to 1. [default: higher for less-known peers]",
)
@POLICY
@setting(
    "client.speculate",
    "--speculate HOW",
    "Send guesses along with each token: auto, off, or a number from 1 to 32. The text stays the same. "
    "[default: auto]",
    choices=("auto", "off"),
)
@setting(
    "client.draft",
    "--draft MODEL",
    "Small model with the same tokenizer that guesses tokens here; auto: the bundled model's own; off: none. "
    "[default: auto]",
)
@setting(
    "client.thin",
    "--thin",
    "Hold no weights and import no torch: the first hop embeds, the last one draws. Both read the text.",
    flag_value="on",
)
@setting(
    "client.prefill_codec",
    "--prefill-codec HOW",
    "Send a prompt's hidden states in 8 bits a value: int8: always, auto: where the line from here was found "
    "slow. It rounds them, so the text may be another one. [default: off]",
    choices=("off", "auto", "int8"),
)
@setting(
    "client.wait_s",
    "--wait SECONDS",
    "How long to wait for a replacement when a peer fails. [default: 60.0]",
)
@DATA_DIR
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="FOLDER_OR_ID",
    help="Tune the model by this adapter for this text: LoRA in peft's files, or one that a node offers.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Generate a text for each prompt of this file: one a line, or JSON Lines with a field `prompt`.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1, 64),
    metavar="N",
    help=f"Texts of --prompts that are generated side by side. [default: {AT_ONCE}]",
)
@click.option("--resume", metavar="TOKEN", help="Continue an interrupted text; give no PROMPT.")
@click.option("--echo", is_flag=True, help="Print the prompt before the text.")
@click.option("--stats", is_flag=True, help="Print the route, timings and audits at the end.")
def generate(
    call: Invocation,
    prompt: str | None,
    as_chat: bool | None,
    system: str | None,
    adapter: Path | None,
    prompts: Path | None,
    at_once: int | None,
    resume: str | None,
    echo: bool,
    stats: bool,
) -> None:
    """Generate text that continues PROMPT.

    The text is streamed to standard output. With --prompts there are many, printed in the order of the file,
    each as soon as it is whole; --json prints a line of JSON for each.

    If PROMPT is -, or is missing while input is piped in, the prompt is read from standard input.

    A model with a chat template gets PROMPT as a user's message and answers it; --raw continues PROMPT.

    If no swarm in reach serves the model, three temporary nodes on this computer run it. This works for the
    bundled model and for a model in a folder.

    A text that is interrupted by Ctrl-C, by --max-new-tokens or by a failure of the swarm is saved. --resume
    continues it with the same tokens as without the interruption.
    """
    from p2pinfer.client_config import AuditConfig, ClientConfig, GenerationConfig, SessionConfig
    from p2pinfer.config import SharedConfig
    from p2pinfer.generation.saved_state import decode_state, find_token
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.routing.config import RoutingConfig
    from p2pinfer.routing.policy import check_policy_name

    settings = call.settings(
        GenerationConfig, ClientConfig, SessionConfig, RoutingConfig, AuditConfig, HostConfig
    )
    waiting = click.get_current_context().with_resource(WaitingLine(quiet=not call.is_for_people))
    waiting.say("reading the prompt from standard input")
    text = prompt if resume or prompts else take_prompt(prompt, quiet=call.quiet)
    waiting.pause()
    if [text, resume, prompts].count(None) != 2:
        raise click.UsageError("give either PROMPT or --resume TOKEN, or --prompts FILE")
    if prompts is None and at_once is not None:
        raise click.UsageError("--at-once is for --prompts FILE")
    many = [] if prompts is None else read_prompts(prompts)
    if resume is not None:
        if as_chat is not None or system is not None:
            raise click.UsageError(
                "--chat, --raw and --system are for a new PROMPT, and --resume continues one"
            )
        _check_nothing_asked_for(call)
    shared, config = settings.build(SharedConfig), settings.build(ClientConfig)
    generation_config, host_config = settings.build(GenerationConfig), settings.build(HostConfig)
    session_config, audit_config = settings.build(SessionConfig), settings.build(AuditConfig)
    routing_config = settings.build(RoutingConfig)
    check_policy_name(config.policy)
    token = None if resume is None else find_token(resume, shared.data_dir)
    more = generation_config.max_new_tokens if "generation.max_new_tokens" in call.flags else None
    if token is not None:
        state = decode_state(token)  # a damaged one is told at once
        if len(state.token_ids) >= state.max_new_tokens:
            more = generation_config.max_new_tokens

    loading = "libp2p" if config.thin == "on" else "torch and libp2p"
    waiting.say(f"loading {loading}", at_once="torch" not in sys.modules)
    from p2pinfer.cli.output.progress import Bars, NodesStarting
    from p2pinfer.cli.output.render import route_table
    from p2pinfer.cli.running import run
    from p2pinfer.client import (
        Client,
    )  # what follows takes seconds to import: libp2p, and torch without --thin
    from p2pinfer.embedded import client_host_config, may_embed, swarm_in_reach

    async def main() -> None:
        embedding = may_embed(shared.model, shared.bootstrap, host_config)
        client = Client(
            **settings.shared(),
            config=config,
            host_config=client_host_config(host_config, embedding=embedding),
            session_config=session_config,
            routing_config=routing_config,
            audit=audit_config,
            progress=Bars(quiet=call.quiet, waiting=waiting),
            on_wait=_waiting_teller(call),
        )
        waiting.say(f"opening {shared.model}")
        with NodesStarting(quiet=call.quiet, waiting=waiting) as starting:
            async with client:
                tuned = None if adapter is None else await client.load_adapter(str(adapter))
                # Before any node is started: nobody should wait for nodes to hear that a prompt is too long.
                if prompts is not None:
                    waiting.say("looking for peers")
                    async with swarm_in_reach(
                        client, embedding=embedding, on_embedding=starting, on_others=_others_teller(call)
                    ):
                        await generate_all(
                            client,
                            [await as_prompt(client.chat_template, each, as_chat, system) for each in many],
                            lambda sent: client.generate(sent, generation_config, adapter=tuned),
                            at_once or AT_ONCE,
                            waiting,
                            as_json=call.json,
                        )
                    return
                if token is not None:
                    generation = client.resume(token, more, tuned)
                    before = generation.prompt + generation.result.text
                else:
                    sent = await as_prompt(client.chat_template, text or "", as_chat, system)
                    generation = client.generate(sent, generation_config, adapter=tuned)
                    before = (text or "") + ("" if isinstance(sent, str) else "\n\n")
                waiting.say("looking for peers")
                async with swarm_in_reach(
                    client, embedding=embedding, on_embedding=starting, on_others=_others_teller(call)
                ):
                    with kept(generation, client, call, shared.data_dir, resume, adapter):
                        await _stream(generation, waiting, before=before if echo else "", silent=call.json)
                    if generation_config.temperature is None and resume is None:
                        _tell_of_draws(generation.result, generation_config.seed, call)
                    waiting.say("auditing the hops")
                    if call.json or stats:
                        await client.audits_settled()
                    if call.json:
                        write_out(result_line(generation, client))
                    if stats:
                        print_note(route_table(generation.result, client.ledger, client.audits))

    run(main)


async def _stream(generation: Generation, waiting: WaitingLine, *, before: str, silent: bool) -> None:
    """Print the tokens as they come. The line is ended also when the generation fails."""
    begun = False
    prompt_tokens = generation.result.prompt_tokens

    def describe() -> str:
        peers = len(generation.result.route)
        return (
            f"sending the prompt ({prompt_tokens:,} tokens) through {peers} peers"
            if peers
            else "looking for a route"
        )

    waiting.say(describe)
    try:
        async for token in generation:
            if silent:
                waiting.say("generating")
            else:
                waiting.pause()
            if token.text and not silent:
                write_out(token.text if begun else before + token.text)
                begun = True
    finally:
        waiting.pause()
        if begun:
            write_out("\n")


def _tell_of_draws(result: GenerationResult, seed: int | None, call: Invocation) -> None:
    """Tell how to get this text again, or the likeliest, where the model's own files ask for draws."""
    if result.seed is not None and seed is None and not call.quiet and not call.json:
        note(
            f"sampled, as the model's settings say: --seed {result.seed} repeats this text, "
            "--temperature 0 is greedy"
        )


def _check_nothing_asked_for(call: Invocation) -> None:
    """A token holds how tokens are drawn; another way would give another text."""
    for key, flag in call.flags.items():
        if key.startswith("generation.") and key != "generation.max_new_tokens":
            raise ConfigError(f"{flag.name} cannot be used with --resume: a resumed text keeps its settings")


def _others_teller(call: Invocation) -> Callable[[str], None]:
    def tell(said: str) -> None:
        if not call.quiet:
            note(f"no peer in reach serves this model, so it runs on this computer; {said}")

    return tell


def _waiting_teller(call: Invocation) -> Callable[[Waiting], None]:
    def tell(waiting: Waiting) -> None:
        if not call.quiet:
            note(f"waiting for up to {waiting.left_s:.0f} s: {waiting.reason}")

    return tell
