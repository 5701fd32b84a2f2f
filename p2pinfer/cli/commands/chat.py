"""`p2pinfer chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

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
from p2pinfer.cli.output.typed_lines import TypedLines, terminal_kept
from p2pinfer.cli.output.waiting import WaitingLine
from p2pinfer.errors import LocalError, P2PInferError

from .conversation import HELP, Conversation, Typed, as_text, clean, read_typed
from .generate import POLICY

if TYPE_CHECKING:
    from p2pinfer.client import Client
    from p2pinfer.client_config import GenerationConfig
    from p2pinfer.generation.generation import GenerationResult
    from p2pinfer.models.text.chat_template import ChatPrompt


@command(
    "chat",
    examples=[
        "p2pinfer chat",
        'p2pinfer chat --model HuggingFaceTB/SmolLM2-135M-Instruct --system "Be brief."',
        "p2pinfer chat --temperature 0.7 --bootstrap /ip4/192.0.2.7/tcp/41234/p2p/12D3KooW...",
    ],
)
@MODEL
@click.option("--system", metavar="TEXT", default="", help="System message of the conversation.")
@setting("generation.max_new_tokens", "--max-new-tokens N", "Stop after N tokens. [default: model's, or 128]")
@setting(
    "generation.temperature", "--temperature T", "Sampling temperature; 0: greedy. [default: model's, or 0]"
)
@setting(
    "generation.top_p",
    "--top-p P",
    "Sample from the likeliest tokens with total probability P. [default: model's, or 1]",
)
@setting("generation.seed", "--seed S", "Random seed; the same seed repeats a text. [default: none]")
@BOOTSTRAP
@SWARM_KEY
@ALLOW
@DENY
@IDENTITY
@POLICY
@DATA_DIR
def chat(call: Invocation, system: str) -> None:
    """Talk to a model. Answers are streamed to standard output; /help lists what else a line can ask for.

    A model without a chat template continues what was said.

    If no swarm in reach serves the model, three temporary nodes on this computer run it. This works for the
    bundled model and for a model in a folder.
    """
    from p2pinfer.client_config import AuditConfig, ClientConfig, GenerationConfig, SessionConfig
    from p2pinfer.config import SharedConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.routing.config import RoutingConfig
    from p2pinfer.routing.policy import check_policy_name

    settings = call.settings(
        GenerationConfig, ClientConfig, SessionConfig, RoutingConfig, AuditConfig, HostConfig
    )
    shared, config = settings.build(SharedConfig), settings.build(ClientConfig)
    generation_config, host_config = settings.build(GenerationConfig), settings.build(HostConfig)
    session_config, audit_config = settings.build(SessionConfig), settings.build(AuditConfig)
    routing_config = settings.build(RoutingConfig)
    check_policy_name(config.policy)

    waiting = click.get_current_context().with_resource(WaitingLine(quiet=not call.is_for_people))
    waiting.say("loading torch and libp2p", at_once="torch" not in sys.modules)
    from p2pinfer.cli.output.progress import Bars, NodesStarting
    from p2pinfer.cli.running import run
    from p2pinfer.client import Client
    from p2pinfer.embedded import client_host_config, may_embed, swarm_in_reach

    @asynccontextmanager
    async def opened(model: str) -> AsyncGenerator[Client]:
        embedding = may_embed(model, shared.bootstrap, host_config)
        named: dict[str, Any] = {**settings.shared(), "model": model}
        client = Client(
            **named,
            config=config,
            host_config=client_host_config(host_config, embedding=embedding),
            session_config=session_config,
            routing_config=routing_config,
            audit=audit_config,
            progress=Bars(quiet=call.quiet, waiting=waiting),
        )
        waiting.say(f"opening {model}")
        with NodesStarting(quiet=call.quiet, waiting=waiting) as starting:
            async with client:
                waiting.say("looking for peers")
                async with swarm_in_reach(client, embedding=embedding, on_embedding=starting, on_others=note):
                    waiting.pause()
                    yield client

    async def main() -> None:
        talk = _Talk(Conversation(clean(system)), generation_config, waiting, quiet=call.quiet)
        model: str | None = shared.model
        with terminal_kept():
            while model is not None:
                asked = model
                try:
                    async with opened(asked) as client:
                        model = await talk.over(client, asked)
                except LocalError as exc:
                    if talk.model in (None, asked):
                        raise
                    note(f"{exc}; going back to {talk.model}")
                    model = talk.model

    run(main)


class _Talk:
    """Conversation with one model after the other.

    Attributes:
        model: The last one that was opened, by the name that was typed.
    """

    def __init__(
        self, conversation: Conversation, config: GenerationConfig, waiting: WaitingLine, *, quiet: bool
    ) -> None:
        self.model: str | None = None
        self._conversation = conversation
        self._config = config
        self._waiting = waiting
        self._quiet = quiet
        self._lines = TypedLines()
        self._result: GenerationResult | None = None

    async def over(self, client: Client, name: str) -> str | None:
        """Talk to the model of that name; returns the next one that is asked for, None at the end."""
        import trio

        self.model, self._result = name, None
        if not self._quiet:
            note(f"talking to {client.spec.model}; /help lists commands, Ctrl-D ends")
            if client.chat_template is None:
                note("this model has no chat template, so it continues what was said")
        if client.chat_template is not None:
            await trio.to_thread.run_sync(client.chat_template.warm_up)
        while True:
            typed = await trio.to_thread.run_sync(read_typed, self._lines.next, abandon_on_cancel=True)
            if typed is None or typed.kind == "quit":
                return None
            if typed.kind == "model" and typed.text:
                return typed.text
            try:
                await self._obey(typed, client)
            except P2PInferError as exc:
                note(f"p2pinfer: {exc}")

    async def _obey(self, typed: Typed, client: Client) -> None:
        talk = self._conversation
        match typed.kind:
            case "ask":
                talk.ask(clean(typed.text))
                await self._answer(client)
            case "retry":
                if talk.take_back():
                    await self._answer(client)
                else:
                    note("nothing was asked so far")
            case "system":
                talk.system = clean(typed.text)
                note("the system message is set" if typed.text else "there is no system message")
            case "clear":
                talk.turns.clear()
                note("the conversation is forgotten")
            case "save" if typed.text:
                note(f"saved as {talk.save(typed.text, client.spec.model)}")
            case "route" | "stats":
                self._tell_of_the_last(client, whole=typed.kind == "stats")
            case "unknown":
                note(typed.text)
            case "help":
                note(HELP)
            case "save" | "model" | "quit":
                note(f"/{typed.kind} needs a name behind it; this model is {client.spec.model}")

    async def _answer(self, client: Client) -> None:
        """Answer the last question; what Ctrl-C stops is an answer, as far as it came."""
        import trio

        from p2pinfer.node.concurrency.nurseries import open_nursery

        talk, text, stopped = self._conversation, "", False
        self._waiting.say("thinking")
        try:
            prompt = await _prompt(client, talk)
            generation: Any = client.generate(prompt, self._config)
            with trio.open_signal_receiver(signal.SIGINT) as interrupts, trio.CancelScope() as answering:
                async with open_nursery() as nursery:

                    async def stop() -> None:
                        async for _ in interrupts:
                            answering.cancel()

                    nursery.start_soon(stop)
                    async with generation:
                        async for token in generation:
                            if token.text:
                                self._waiting.pause()
                                text += token.text
                                write_out(token.text)
                    nursery.cancel_scope.cancel()
            stopped = answering.cancelled_caught and generation.result.finish_reason is None
            self._result = generation.result
        finally:
            self._waiting.pause()
            if text:
                write_out("\n")
                talk.answer(text)
            else:
                talk.drop_question()
        if stopped:
            note("stopped")
        elif not text:
            note("the model said nothing; ask otherwise, or /clear")

    def _tell_of_the_last(self, client: Client, *, whole: bool) -> None:
        from p2pinfer.cli.output.plain import short_peer
        from p2pinfer.cli.output.render import route_table

        if self._result is None:
            note("nothing was answered so far")
        elif whole:
            print_note(route_table(self._result, client.ledger, client.audits))
        else:
            for hop in self._result.route:
                note(f"{short_peer(hop.peer_id)}  blocks {hop.span}  {hop.connection}")


async def _prompt(client: Client, talk: Conversation) -> str | ChatPrompt:
    import trio

    if client.chat_template is None:
        return as_text(talk.messages)
    return await trio.to_thread.run_sync(client.chat_template.render, talk.messages)
