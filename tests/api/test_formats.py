"""Answers that are held to a form, from a real model that knows nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import trio

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.http_server import serve_http
from p2pinfer.audit.tally import AuditTally
from p2pinfer.client import Client
from p2pinfer.client_config import ClientConfig, GenerationConfig
from p2pinfer.generation.generation import Generation
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.session.terms import SessionAdapter

from .conftest import OpenDoor
from .scripted import HERMES

openai: Any = pytest.importorskip("openai")
anthropic: Any = pytest.importorskip("anthropic")
ollama: Any = pytest.importorskip("ollama")

STORY = [{"role": "user", "content": "Once upon a time"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "hero": {"enum": ["girl", "dog"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["hero", "age"],
    "additionalProperties": False,
}
FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "hero", "schema": SCHEMA, "strict": True},
}
ASKED: dict[str, Any] = {"model": "tiny-stories", "messages": STORY, "max_tokens": 120}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look-up", "parameters": {"properties": {}}}}


async def in_thread(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return await trio.to_thread.run_sync(partial(function, *args, **named))


def check(text: str) -> None:
    said = json.loads(text)
    assert said["hero"] in ("girl", "dog")
    assert said["age"] in range(1, 10)
    assert len(said) == 2


async def test_json_is_written_in_every_dialect(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk() -> None:
            with openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
                create = client.chat.completions.create
                for options in ({}, {"temperature": 1.5, "seed": 1}):
                    whole = create(**ASKED, response_format=FORMAT, **options).choices[0]
                    check(whole.message.content)
                    assert whole.finish_reason == "stop"
                    chunks = create(**ASKED, response_format=FORMAT, stream=True, **options)
                    assert (
                        "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                        == whole.message.content
                    )
                anything = create(**ASKED | {"max_tokens": 24}, response_format={"type": "json_object"})
                assert anything.choices[0].message.content.startswith("{")
                with pytest.raises(openai.BadRequestError, match="no text can follow this grammar"):
                    create(
                        **ASKED,
                        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "x"}}},
                    )
                with pytest.raises(openai.BadRequestError, match="response_format must be of type"):
                    create(**ASKED, response_format={"type": "xml"})
            with anthropic.Anthropic(base_url=door.url, api_key="none", max_retries=0) as client:
                form = {"format": {"type": "json_schema", "schema": SCHEMA}}
                check(client.messages.create(**ASKED, output_config=form).content[0].text)
            with ollama.Client(host=door.url) as client:
                check(client.chat("tiny-stories", STORY, format=SCHEMA).message.content)
                check(client.generate("tiny-stories", "Once", format=SCHEMA).response)

        await in_thread(talk)
        await door.swarm.all_closed()


@pytest.mark.parametrize("speculate", ["off", "4"])
async def test_a_text_follows_also_with_guesses_and_when_it_is_resumed(
    open_door: OpenDoor, speculate: str
) -> None:
    wish: dict[str, Any] = {"grammar": json.dumps(SCHEMA), "temperature": 1.0, "seed": 5}
    config = ClientConfig(dtype="float32", speculate=speculate)
    async with open_door(config=config) as door:

        async def text_of(generation: Generation) -> str:
            async with generation:
                async for _ in generation:
                    pass
            return generation.result.text

        whole = await text_of(door.client.generate("Once", max_new_tokens=80, **wish))
        check(whole)
        part = door.client.generate("Once", max_new_tokens=5, **wish)
        begun = await text_of(part)
        assert whole.startswith(begun)
        assert begun != whole
        assert part.resume_token is not None
        assert await text_of(door.client.resume(part.resume_token, 75)) == whole


@dataclass
class WithTools:
    """The client's model, with a chat template."""

    client: Client
    template: ChatTemplate = HERMES

    @property
    def spec(self) -> ModelSpec:
        return self.client.spec

    @property
    def chat_template(self) -> ChatTemplate:
        return self.template

    @property
    def audits(self) -> AuditTally:
        return self.client.audits

    async def load_adapter(self, folder: str) -> SessionAdapter:
        return await self.client.load_adapter(folder)

    def generate(
        self, prompt: str | ChatPrompt, config: GenerationConfig, *, adapter: SessionAdapter | None = None
    ) -> Generation:
        return self.client.generate(prompt, config, adapter=adapter)


@pytest.mark.parametrize("clue", ["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"])
async def test_a_call_is_made_where_one_has_to_be(open_door: OpenDoor, clue: str) -> None:
    template = ChatTemplate({"default": f"{{{{ messages[-1].content }}}}{{# tools {clue} #}}"}, {})
    config = ApiConfig(port=0)
    async with open_door() as door, open_nursery() as nursery:
        app = App([WithTools(door.client, template)], config)
        ((_, port),) = await nursery.start(serve_http, app.handle, config)

        def talk() -> None:
            url = f"http://127.0.0.1:{port}"
            asked: dict[str, Any] = ASKED | {"tools": [LOOK, ADD]}
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                create = client.chat.completions.create
                (call,) = (
                    create(**asked, tool_choice={"type": "function", "function": {"name": "add"}})
                    .choices[0]
                    .message.tool_calls
                )
                assert call.function.name == "add"
                check(call.function.arguments)
                strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
                one = ASKED | {"tools": [strict], "tool_choice": "required"}
                choice = create(**one).choices[0]
                check(choice.message.tool_calls[0].function.arguments)
                assert choice.finish_reason == "tool_calls"
                with pytest.raises(openai.BadRequestError, match="names 'rm', which is none of the tools"):
                    create(**asked, tool_choice={"type": "function", "function": {"name": "rm"}})
                free = create(**ASKED, tools=[strict]).choices[0]  # it tells a story, as it may
                assert free.message.content
                assert free.message.tool_calls is None
                with pytest.raises(openai.BadRequestError, match="not supported together"):
                    create(**asked, response_format=FORMAT)
            with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
                tools = [{"name": "add", "input_schema": SCHEMA, "strict": True}]
                message = client.messages.create(
                    **ASKED, tools=tools, tool_choice={"type": "tool", "name": "add"}
                )
                (block,) = message.content
                assert (block.name, message.stop_reason) == ("add", "tool_use")
                check(json.dumps(block.input))

        await in_thread(talk)
        nursery.cancel_scope.cancel()
