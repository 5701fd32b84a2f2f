"""Anthropic's own client against the API: what it asks for, it gets; what is not honoured, it is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio

from p2pinfer.api.config import ApiConfig
from p2pinfer.client_config import ClientConfig
from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from .conftest import OpenDoor
from .scripted import HERMES, serve_script

anthropic: Any = pytest.importorskip("anthropic")

KEY = "a-key-of-more-than-16"
STORY = [{"role": "user", "content": "Once upon a time"}]
ASKED: dict[str, Any] = {"model": "tiny-stories", "messages": STORY, "max_tokens": 13}
TEXT = ", there was a little girl named Lily. She loved to play"
TOOLS = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]
CALL = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": [3]}}\n</tool_call>'


def client_of(url: str, **options: Any) -> Any:
    options = {"api_key": "none", **options}
    return anthropic.Anthropic(base_url=url, max_retries=0, timeout=30, **options)


async def in_thread(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return await trio.to_thread.run_sync(partial(function, *args, **named))


async def test_models_are_listed_and_messages_are_answered_and_counted(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> None:
            assert [model.id for model in client.models.list()] == ["tiny-stories"]
            assert client.models.retrieve("tiny-stories").type == "model"
            message = client.messages.create(**ASKED)
            assert [(block.type, block.text) for block in message.content] == [("text", TEXT)]
            assert (message.role, message.stop_reason, message.stop_sequence) == (
                "assistant",
                "max_tokens",
                None,
            )
            assert (message.usage.input_tokens, message.usage.output_tokens) == (5, 13)
            assert [hop["blocks"] for hop in message.p2pinfer["route"]] == [[0, 5], [5, 8]]
            counted = client.messages.count_tokens(model="tiny-stories", messages=STORY)
            assert counted.input_tokens == 5
            stopped = client.messages.create(**ASKED | {"stop_sequences": ["never", " named"]})
            assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " named")
            assert stopped.content[0].text == ", there was a little girl"

        with client_of(door.url) as client:
            await in_thread(talk, client)
        await door.swarm.all_closed()


async def test_a_stream_has_the_same_text_in_pieces(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> tuple[list[str], Any, list[str]]:
            kinds: list[str] = []
            with client.messages.stream(**ASKED) as stream:
                kinds += [event.type for event in stream]
                message = stream.get_final_message()
            with client.messages.stream(**ASKED) as stream:
                return kinds, message, list(stream.text_stream)

        with client_of(door.url) as client:
            kinds, message, pieces = await in_thread(talk, client)
        await door.swarm.all_closed()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert (message.content[0].text, message.stop_reason) == (TEXT, "max_tokens")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (5, 13)
    assert "".join(pieces) == TEXT
    assert len(pieces) > 5


async def test_a_client_that_stops_early_leaves_nothing_behind(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> None:
            with client.messages.stream(**ASKED | {"max_tokens": 900}) as stream:
                next(iter(stream.text_stream))

        with client_of(door.url) as client:
            await in_thread(talk, client)
            await door.swarm.all_closed()


async def test_calls_of_tools_are_blocks_of_their_own(checkpoint: Checkpoint) -> None:
    async with serve_script(checkpoint, CALL) as (url, script):
        asked = ASKED | {"max_tokens": 200, "tools": TOOLS, "system": "Be brief."}

        def talk(client: Any) -> tuple[Any, Any]:
            whole = client.messages.create(**asked)
            with client.messages.stream(**asked) as stream:
                return whole, stream.get_final_message()

        with client_of(url) as client:
            for message in await in_thread(talk, client):
                text, call = message.content
                assert (text.type, text.text, message.stop_reason) == ("text", "Let me see.", "tool_use")
                assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 2, "b": [3]})
    tool = {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
    }
    messages = [{"role": "system", "content": "Be brief."}, *STORY]
    assert script.prompts == [HERMES.render(messages, tools=[tool]).text] * 2


async def test_an_answer_that_was_begun_goes_on(checkpoint: Checkpoint) -> None:
    async with serve_script(checkpoint, " it is") as (url, script):
        messages = [*STORY, {"role": "assistant", "content": "So"}]
        with client_of(url) as client:
            message = await in_thread(client.messages.create, **ASKED | {"messages": messages})
    assert message.content[0].text == " it is"
    assert script.prompts == ["Once upon a timeSo"]


async def test_errors_are_the_ones_that_the_client_knows(open_door: OpenDoor) -> None:
    hasty = ClientConfig(dtype="float32", find_timeout_s=0.05)
    async with open_door(ApiConfig(), (KEY,), config=hasty) as door:
        with (
            client_of(door.url, api_key=KEY) as client,
            client_of(door.url, api_key=None, auth_token=KEY) as bearer,
            client_of(door.url) as stranger,
        ):
            assert await in_thread(bearer.messages.count_tokens, model="tiny-stories", messages=STORY)
            with pytest.raises(anthropic.AuthenticationError, match="API key is missing or wrong") as refused:
                await in_thread(stranger.messages.create, **ASKED)
            assert refused.value.body["error"]["type"] == "authentication_error"
            with pytest.raises(anthropic.BadRequestError, match="tools are not supported") as refused:
                await in_thread(client.messages.create, **ASKED, tools=TOOLS)
            assert refused.value.body["type"] == "error"
            with pytest.raises(anthropic.BadRequestError, match="context of tiny-stories is 1024"):
                long = [{"role": "user", "content": "word " * 2000}]
                await in_thread(client.messages.create, **ASKED | {"messages": long})
            with pytest.raises(anthropic.NotFoundError, match="'claude' is not served here"):
                await in_thread(client.messages.create, **ASKED | {"model": "claude"})
            with pytest.raises(anthropic.NotFoundError, match="there is no /v1/messages/batches"):
                await in_thread(client.messages.batches.list)
            await door.swarm.network.kill("b")
            with pytest.raises(anthropic.InternalServerError) as failed:
                await in_thread(client.messages.create, **ASKED)
            assert (failed.value.status_code, failed.value.body["error"]["type"]) == (503, "overloaded_error")


async def test_a_stream_that_cannot_go_on_ends_with_an_error(open_door: OpenDoor) -> None:
    impatient = ClientConfig(dtype="float32", find_timeout_s=0.05, wait_s=0.1, max_attempts=1)
    async with open_door(config=impatient) as door:

        def begin(client: Any) -> tuple[Any, Any]:
            stream = client.messages.create(**ASKED | {"max_tokens": 900, "stream": True})
            events = iter(stream)
            return stream, [next(events) for _ in range(3)]

        with client_of(door.url) as client:
            stream, _ = await in_thread(begin, client)
            await door.swarm.network.kill("b")
            with pytest.raises(anthropic.APIError) as failed:
                await in_thread(list, stream)
            assert failed.value.body["error"]["type"] == "overloaded_error"
