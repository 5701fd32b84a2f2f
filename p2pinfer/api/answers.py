"""Answers to a request as one stream of events, the same for every dialect.

A dialect turns its request into an `Asked` and these events into its own shapes. Several answers to one
request are as many generations side by side, whose events are told apart by their index.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import trio

from p2pinfer.audit.tally import AuditTally
from p2pinfer.client_config import GenerationConfig
from p2pinfer.generation.generation import Generation, GenerationResult, Token
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.call_marks import CALL_MARKS
from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate
from p2pinfer.models.text.grammar import check_grammar
from p2pinfer.node.concurrency.nurseries import bare_errors
from p2pinfer.session.terms import SessionAdapter

from .errors import ApiError
from .tool_calls import CallReader, Toolbox, ToolCall

Message: TypeAlias = Mapping[str, Any]
_SEEDS: Final = 1 << 63
# A template that hangs holds up conversations, and not the threads that draw tokens.
_RENDERS_AT_ONCE: Final = 2
_renders: Final[trio.lowlevel.RunVar[trio.CapacityLimiter]] = trio.lowlevel.RunVar("renders")


class TextSource(Protocol):
    """Source of generations: the client."""

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        ...

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Its chat template; None if it has none."""
        ...

    @property
    def audits(self) -> AuditTally:
        """Results of all audits of its hops so far."""
        ...

    async def load_adapter(self, folder: str, /) -> SessionAdapter:
        """Adapter that nodes offer, by its id."""
        ...

    def generate(
        self, prompt: str | ChatPrompt, config: GenerationConfig, *, adapter: SessionAdapter | None = None
    ) -> Generation:
        """Continue `prompt`, with the model tuned by `adapter`."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for texts.

    Attributes:
        prompt: A text that is continued, or a conversation that is answered.
        choices: Number of answers.
        variables: Of the chat template, such as `enable_thinking`.
        toolbox: Tools that the answers may call.
        continues: The last message is the beginning of the answer.
    """

    prompt: str | tuple[Message, ...]
    config: GenerationConfig
    choices: int = 1
    variables: Mapping[str, Any] | None = None
    toolbox: Toolbox | None = None
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """An answer's first token is there."""

    index: int
    result: GenerationResult


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer.

    Attributes:
        token: The next one; None at the end, for what was held back.
        text: What became certain with it, less calls of tools.
        calls: Those that are complete with it.
    """

    index: int
    token: Token | None
    text: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer is complete.

    Attributes:
        called: It called a tool.
        audits: Results of audits so far, of this answer's hops and of others: this one is audited afterwards.
    """

    index: int
    result: GenerationResult
    called: bool = False
    audits: AuditTally = field(default_factory=AuditTally)


Event: TypeAlias = Begun | Piece | Ended
Tell: TypeAlias = Callable[[Event], Awaitable[None]]


async def prepare(
    source: TextSource, asked: Asked, adapter: SessionAdapter | None = None
) -> list[Generation]:
    """Generations that answer the request, one for each choice. Nothing has been sent to a peer yet.

    Raises:
        LocalError: The prompt is too long, or the model's template refuses the conversation.
    """
    prompt = await _prompt(source.chat_template, asked)

    def begin() -> list[Generation]:  # in a thread: a long prompt takes long to become tokens
        if asked.config.grammar is not None:
            check_grammar(asked.config.grammar)
        first, *others = (
            source.generate(prompt, _config_of(asked, index), adapter=adapter)
            for index in range(asked.choices)
        )
        if others:
            first.share_prefill(*others)
        return [first, *others]

    return await trio.to_thread.run_sync(begin)


async def run(
    generations: Sequence[Generation], tell: Tell, toolbox: Toolbox | None, source: TextSource
) -> None:
    """Generate, and tell of every event as it happens; when this ends, no hop holds anything any more.

    Raises:
        NoRoute, PeerError: The swarm cannot serve the request, or not any longer.
    """

    async def answer(index: int, generation: Generation) -> None:
        reader = None if toolbox is None else CallReader(toolbox)
        begun = called = False
        async with generation:
            async for token in generation:
                if not begun:
                    begun = True
                    await tell(Begun(index, generation.result))
                if reader is None or toolbox is None:
                    await tell(Piece(index, token, token.text))
                    continue
                hidden = generation.tokenizer.special_texts.get(token.id)
                text, calls = reader.push(token.text + (hidden if hidden in CALL_MARKS else ""))
                await tell(Piece(index, token, text, calls))
                called = called or bool(calls)
                if called and toolbox.single:
                    break
            else:
                if reader is not None:
                    text, calls = reader.finish()
                    called = called or bool(calls)
                    await tell(Piece(index, None, text, calls))
        await tell(Ended(index, generation.result, called, source.audits))

    if len(generations) == 1:
        return await answer(0, generations[0])
    with bare_errors():
        async with trio.open_nursery() as nursery:
            for index, generation in enumerate(generations):
                nursery.start_soon(answer, index, generation)
    return None


async def _prompt(template: ChatTemplate | None, asked: Asked) -> str | ChatPrompt:
    if isinstance(asked.prompt, str):
        return asked.prompt
    if template is not None:
        render = partial(
            template.render,
            asked.prompt,
            tools=None if asked.toolbox is None else asked.toolbox.schemas,
            add_generation_prompt=not asked.continues,
            continue_final_message=asked.continues,
            **dict[str, Any](asked.variables or {}),
        )
        return await trio.to_thread.run_sync(render, limiter=_limiter())
    # A model that was not made for chats continues what was said, as `p2pinfer generate` does.
    return "\n\n".join(str(message["content"]) for message in asked.prompt if message.get("content"))


def _limiter() -> trio.CapacityLimiter:
    try:
        return _renders.get()
    except LookupError:
        _renders.set(made := trio.CapacityLimiter(_RENDERS_AT_ONCE))
        return made


def _config_of(asked: Asked, index: int) -> GenerationConfig:
    seed = asked.config.seed
    if seed is None or index == 0:
        return asked.config
    return replace(asked.config, seed=(seed + index + _SEEDS) % (2 * _SEEDS) - _SEEDS)


def check_choices(choices: int, most: int, name: str) -> None:
    """Nothing, if so many answers may be asked for.

    Raises:
        ApiError: They may not.
    """
    if not 1 <= choices <= most:
        raise ApiError(f"{name} is {choices}; this server gives 1 to {most} answers", param=name)
