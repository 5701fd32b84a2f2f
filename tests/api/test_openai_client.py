"""OpenAI's own client against the API: what it asks for, it gets; what is not honoured, it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio

from p2pinfer.api.config import ApiConfig
from p2pinfer.client_config import ClientConfig
from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from .conftest import Door, OpenDoor
from .scripted import serve_script

openai: Any = pytest.importorskip("openai")

KEY = "a-key-of-more-than-16"
STORY = [{"role": "user", "content": "Once upon a time"}]
TEXT = ", there was a little girl named Lily. She loved to play"


def client_of(door: Door, key: str = "none", retries: int = 0) -> Any:
    return openai.OpenAI(base_url=f"{door.url}/v1", api_key=key, max_retries=retries, timeout=30)


async def in_thread(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return await trio.to_thread.run_sync(partial(function, *args, **named))


async def test_models_are_listed_and_chats_and_texts_are_continued(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> None:
            assert [model.id for model in client.models.list()] == ["tiny-stories"]
            assert client.models.retrieve("tiny-stories").max_model_len == 1024
            chat = client.chat.completions.create(model="tiny-stories", messages=STORY, max_tokens=13)
            (choice,) = chat.choices
            assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
            assert choice.finish_reason == "length"
            assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (5, 13)
            assert [hop["blocks"] for hop in chat.p2pinfer["route"]] == [[0, 5], [5, 8]]
            whole = client.completions.create(model="tiny-stories", prompt="Once upon a time", echo=True)
            assert whole.choices[0].text.startswith("Once upon a time, there was a little girl")
            assert whole.usage.completion_tokens == 16

        with client_of(door) as client:
            await in_thread(talk, client)
        await door.swarm.all_closed()


async def test_a_stream_has_the_same_text_in_pieces_and_then_its_usage(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> list[Any]:
            return list(
                client.chat.completions.create(
                    model="tiny-stories",
                    messages=STORY,
                    max_tokens=13,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )

        with client_of(door) as client:
            *chunks, end, last = await in_thread(talk, client)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert len(chunks) == 14
    assert end.choices[0].finish_reason == "length"
    assert (last.choices, last.usage.total_tokens) == ([], 18)
    assert len({chunk.id for chunk in (*chunks, end, last)}) == 1


async def test_every_choice_has_its_own_seed_and_the_same_request_the_same_texts(open_door: OpenDoor) -> None:
    wish: dict[str, Any] = {"model": "tiny-stories", "max_tokens": 8, "temperature": 1.0, "seed": 7, "n": 3}
    async with open_door() as door:

        def talk(client: Any) -> tuple[list[str], list[str], list[str]]:
            whole = client.chat.completions.create(messages=STORY, **wish)
            streamed = ["", "", ""]
            for chunk in client.chat.completions.create(messages=STORY, stream=True, **wish):
                (choice,) = chunk.choices
                streamed[choice.index] += choice.delta.content or ""
            alone = client.completions.create(prompt="Once upon a time", **wish | {"seed": 8, "n": 1})
            return [each.message.content for each in whole.choices], streamed, [alone.choices[0].text]

        with client_of(door) as client:
            whole, streamed, alone = await in_thread(talk, client)
    assert whole == streamed
    assert len(set(whole)) == 3
    assert alone == whole[1:2]


async def test_logprobs_are_those_of_the_model_whatever_is_drawn(open_door: OpenDoor) -> None:
    wish: dict[str, Any] = {"model": "tiny-stories", "max_tokens": 6, "temperature": 1.5, "seed": 3}
    async with open_door() as door:

        def talk(client: Any) -> tuple[Any, list[Any], Any]:
            asked = {"messages": STORY, "logprobs": True, "top_logprobs": 3, **wish}
            whole = client.chat.completions.create(**asked)
            streamed = [
                entry
                for chunk in client.chat.completions.create(stream=True, **asked)
                if chunk.choices[0].logprobs
                for entry in chunk.choices[0].logprobs.content
            ]
            text = client.completions.create(prompt="Once upon a time", logprobs=3, **wish)
            return whole.choices[0], streamed, text.choices[0]

        with client_of(door) as client:
            whole, streamed, text = await in_thread(talk, client)
    entries = whole.logprobs.content
    assert entries == streamed
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == whole.message.content == text.text
    for entry in entries:
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] <= 0
        by_text = {other.token: other.logprob for other in entry.top_logprobs}
        assert by_text.get(entry.token, entry.logprob) == entry.logprob
    assert text.logprobs.token_logprobs == [entry.logprob for entry in entries]
    assert text.logprobs.text_offset[1] == len(text.logprobs.tokens[0])


async def test_a_stop_ends_the_text_before_it(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> Any:
            asked = {"model": "tiny-stories", "messages": STORY, "stop": [" named", "never"]}
            return client.chat.completions.create(max_completion_tokens=50, **asked).choices[0]

        with client_of(door) as client:
            choice = await in_thread(talk, client)
    assert (choice.message.content, choice.finish_reason) == (", there was a little girl", "stop")


async def test_errors_are_the_ones_that_the_client_knows(open_door: OpenDoor) -> None:
    asked = {"model": "tiny-stories", "messages": STORY, "max_tokens": 2}
    hasty = ClientConfig(dtype="float32", find_timeout_s=0.05)
    async with open_door(ApiConfig(requests_per_key=1, queue_per_key=0), (KEY,), config=hasty) as door:
        with client_of(door, KEY) as client, client_of(door, "another") as stranger:
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                await in_thread(stranger.models.list)
            with pytest.raises(openai.BadRequestError, match="presence_penalty is not supported") as refused:
                await in_thread(client.chat.completions.create, **asked, presence_penalty=0.5)
            assert (refused.value.type, refused.value.param) == ("invalid_request_error", "presence_penalty")
            with pytest.raises(openai.BadRequestError, match="context of tiny-stories is 1024") as refused:
                await in_thread(client.completions.create, model="tiny-stories", prompt="word " * 2000)
            assert refused.value.code == "context_length_exceeded"
            with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here"):
                await in_thread(client.chat.completions.create, **asked | {"model": "gpt-5"})
            with pytest.raises(
                openai.BadRequestError, match="tiny-stories has no embeddings: it is a decoder-only model"
            ):
                await in_thread(client.embeddings.create, model="tiny-stories", input="text")

            stream = await in_thread(
                client.chat.completions.create, **asked | {"max_tokens": 900}, stream=True
            )
            with pytest.raises(openai.RateLimitError, match="1 requests are being answered") as raised:
                await in_thread(client.chat.completions.create, **asked)
            assert raised.value.response.headers["retry-after"] == "5"
            await in_thread(stream.close)
            await door.swarm.all_closed()

            await door.swarm.network.kill("b")
            with pytest.raises(openai.InternalServerError) as failed:
                await in_thread(client.chat.completions.create, **asked)
            assert failed.value.status_code == 503


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = 'Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>\n' * 2


async def test_calls_of_tools_are_read_from_the_text(checkpoint: Checkpoint) -> None:
    asked: dict[str, Any] = {"model": "tiny-stories", "messages": STORY, "tools": [TOOL], "n": 2}
    async with serve_script(checkpoint, CALL) as (url, script):

        def talk(client: Any) -> tuple[Any, list[Any], Any]:
            create = client.chat.completions.create
            with client.chat.completions.stream(**asked | {"n": 1}) as stream:
                final = stream.get_final_completion().choices[0]
            return create(**asked), list(create(**asked, stream=True)), final

        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole, chunks, final = await in_thread(talk, client)
            single = await in_thread(client.chat.completions.create, **asked, parallel_tool_calls=False)
            answer = whole.choices[0].message.to_dict()
            result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "4"}
            await in_thread(
                client.chat.completions.create, **asked | {"messages": [*STORY, answer, result], "n": 1}
            )
    for choice in (*whole.choices, final):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Well.\nWell."
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("add", '{"a": 2}')] * 2
    assert [len(choice.message.tool_calls) for choice in single.choices] == [1, 1]
    for index in range(2):
        told = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert [call.index for choice in told for call in choice.delta.tool_calls or ()] == [0, 1]
        assert told[-1].finish_reason == "tool_calls"
    assert "<tool_response>4</tool_response>" in script.prompts[-1]
    assert '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>' in script.prompts[-1]


async def test_responses_are_whole_or_events_and_keep_nothing(open_door: OpenDoor) -> None:
    asked: dict[str, Any] = {"model": "tiny-stories", "input": "Once upon a time", "max_output_tokens": 13}
    async with open_door() as door:

        def talk(client: Any) -> None:
            whole = client.responses.create(**asked)
            assert (whole.output_text, whole.status) == (TEXT, "incomplete")
            assert whole.incomplete_details.reason == "max_output_tokens"
            assert (whole.usage.input_tokens, whole.usage.output_tokens) == (5, 13)
            kinds: list[str] = []
            last: Any = None
            with client.responses.stream(**asked) as stream:
                for event in stream:
                    assert event.sequence_number == len(kinds)
                    kinds.append(event.type)
                    last = event
            assert last.response.output_text == TEXT
            assert kinds[0] == "response.created"
            assert kinds[-1] == "response.incomplete"
            assert kinds.count("response.output_text.delta") > 5
            schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
            schema |= {"required": ["a"], "additionalProperties": False}
            form = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
            said = client.responses.create(**asked | {"max_output_tokens": 90}, text=form).output_text
            assert json.loads(said)["a"] in (1, 2)
            for wish in ({"previous_response_id": "resp_1"}, {"store": True}):
                with pytest.raises(openai.BadRequestError, match="nothing is kept; send the whole"):
                    client.responses.create(**asked | wish)

        with client_of(door) as client:
            await in_thread(talk, client)
        await door.swarm.all_closed()


async def test_responses_have_calls_of_tools_as_items(checkpoint: Checkpoint) -> None:
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}}
    asked: dict[str, Any] = {"model": "tiny-stories", "input": "Add", "tools": [tool]}
    async with serve_script(checkpoint, CALL) as (url, script):

        def talk(client: Any) -> tuple[Any, Any]:
            whole = client.responses.create(**asked)
            with client.responses.stream(**asked) as stream:
                for _ in stream:
                    pass
                final = stream.get_final_response()
            output = [item.to_dict() for item in whole.output]
            results = [
                {"type": "function_call_output", "call_id": item["call_id"], "output": "4"}
                for item in output
                if item["type"] == "function_call"
            ]
            question = {"role": "user", "content": [{"type": "input_text", "text": "Add"}]}
            client.responses.create(
                **asked | {"input": [question, *output, *results]}, instructions="Be brief."
            )
            return whole, final

        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for answer in await in_thread(talk, client):
                calls = [item for item in answer.output if item.type == "function_call"]
                assert [(call.name, call.arguments) for call in calls] == [("add", '{"a": 2}')] * 2
                assert answer.status == "completed"
    assert script.prompts[-1].count("<tool_call>") == 2
    assert "Be brief." in script.prompts[-1]
    assert "<tool_response>4" in script.prompts[-1]
