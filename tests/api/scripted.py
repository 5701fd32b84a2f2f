"""Source of texts that are written beforehand: what a model with tools would say, token by token."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.http_server import serve_http
from p2pinfer.audit.tally import AuditTally
from p2pinfer.client_config import GenerationConfig
from p2pinfer.generation.generation import GenerationResult, Timings, Token
from p2pinfer.generation.transcript import FinishReason
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate
from p2pinfer.models.text.text import Tokenizer, load_tokenizer
from p2pinfer.models.text.text_stream import TextStream
from p2pinfer.node.concurrency.nurseries import open_nursery

TEMPLATES = Path(__file__).parent.parent / "models" / "text" / "chat_templates"
HERMES = ChatTemplate(
    {"default": (TEMPLATES / "tools-tools-in-the-system-prompt.jinja").read_text("utf-8")}, {}
)


class ScriptedGeneration:
    """An answer that was written beforehand, in the tokens of a real tokenizer."""

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, text: str) -> None:
        self.tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._ids = tokenizer.encode(text, add_special_tokens=False)
        self._taken = 0
        self._stream = TextStream(tokenizer, at_start=True)

    async def __aenter__(self) -> ScriptedGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def __aiter__(self) -> ScriptedGeneration:
        return self

    async def __anext__(self) -> Token:
        await trio.lowlevel.checkpoint()
        if self._taken == len(self._ids):
            raise StopAsyncIteration
        self._taken += 1
        token_id = self._ids[self._taken - 1]
        text = self._stream.push(token_id)
        return Token(token_id, text + (self._stream.finish() if self._taken == len(self._ids) else ""))

    def share_prefill(self, *others: Any) -> None:
        """There is none."""

    @property
    def result(self) -> GenerationResult:
        """What a real one tells."""
        ids = tuple(self._ids[: self._taken])
        timings = Timings(0.01, 100.0, (), 0.01)
        ended: FinishReason | None = "eos" if self._taken == len(self._ids) else None
        return GenerationResult("", ids, self._prompt_tokens, ended, (), timings, 0)


@dataclass
class Script:
    """A `TextSource` whose model always gives the same answer.

    Attributes:
        prompts: What it was asked, in the order of the requests.
        loaded: Adapters that were asked for.
        audits: What audits of its peers are said to have found.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    answer: str
    chat_template: ChatTemplate | None = HERMES
    prompts: list[str] = field(default_factory=list[str])
    loaded: list[str] = field(default_factory=list[str])
    audits: AuditTally = field(default_factory=AuditTally)

    async def load_adapter(self, folder: str) -> Any:
        """A name for it, which answers begin with."""
        await trio.lowlevel.checkpoint()
        self.loaded.append(folder)
        return f"[{folder[:4]}] "

    def generate(self, prompt: str | ChatPrompt, config: GenerationConfig, *, adapter: Any = None) -> Any:
        """Answer."""
        text = prompt if isinstance(prompt, str) else prompt.text
        self.prompts.append(text)
        answer = (adapter or "") + self.answer
        return ScriptedGeneration(self.tokenizer, len(self.tokenizer.encode(text)), answer)


@asynccontextmanager
async def serve_script(
    checkpoint: Checkpoint, answer: str, template: ChatTemplate | None = HERMES
) -> AsyncGenerator[tuple[str, Script]]:
    """Serve such a model; gives the URL and the model."""
    script = Script(checkpoint.spec, load_tokenizer(checkpoint.folder), answer, template)
    config = ApiConfig(port=0)
    async with open_nursery() as nursery:
        ((_, port),) = await nursery.start(serve_http, App([script], config).handle, config)
        yield f"http://127.0.0.1:{port}", script
