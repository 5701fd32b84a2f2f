"""Ollama's own client against the API: what it asks for, it gets; what is not honoured, it is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio

from p2pinfer.client_config import ClientConfig
from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from .conftest import OpenDoor
from .scripted import serve_script

ollama: Any = pytest.importorskip("ollama")

STORY = [{"role": "user", "content": "Once upon a time"}]
CHAT: dict[str, Any] = {"model": "tiny-stories", "messages": STORY, "options": {"num_predict": 13}}
TEXT = ", there was a little girl named Lily. She loved to play"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'


async def in_thread(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return await trio.to_thread.run_sync(partial(function, *args, **named))


async def test_models_are_listed_and_shown(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> None:
            (model,) = client.list().models
            assert (model.model, model.details.family) == ("tiny-stories", "llama")
            (running,) = client.ps().models
            assert (running.model, running.context_length) == ("tiny-stories", 1024)
            shown = client.show("tiny-stories:latest")
            assert shown.modelinfo["llama.context_length"] == 1024
            assert shown.capabilities == ["completion"]

        with ollama.Client(host=door.url) as client:
            await in_thread(talk, client)


async def test_chats_and_texts_are_continued_whole_and_in_pieces(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> None:
            whole = client.chat(**CHAT)
            assert (whole.message.role, whole.message.content) == ("assistant", TEXT)
            assert (whole.done, whole.done_reason) == (True, "length")
            assert (whole.prompt_eval_count, whole.eval_count) == (5, 13)
            parts = (whole.load_duration, whole.prompt_eval_duration, whole.eval_duration)
            assert all(isinstance(part, int) and part >= 0 for part in parts)
            assert sum(parts) == whole.total_duration
            *pieces, last = client.chat(**CHAT, stream=True)
            assert "".join(piece.message.content for piece in pieces) == TEXT
            assert (last.message.content, last.done, last.eval_count) == ("", True, 13)
            options = {"num_predict": 13, "stop": [" named"]}
            text = client.generate("tiny-stories", "Once upon a time", options=options)
            assert (text.response, text.done_reason) == (", there was a little girl", "stop")
            pieces = client.generate("tiny-stories", "Once upon a time", options=options, stream=True)
            assert "".join(piece.response for piece in pieces) == text.response
            assert client.generate("tiny-stories", "").done_reason == "load"

        with ollama.Client(host=door.url) as client:
            await in_thread(talk, client)
        await door.swarm.all_closed()


async def test_a_client_that_stops_early_leaves_nothing_behind(open_door: OpenDoor) -> None:
    async with open_door() as door:

        def talk(client: Any) -> None:
            pieces = client.chat(**CHAT | {"options": {"num_predict": 900}}, stream=True)
            next(pieces)
            pieces.close()

        with ollama.Client(host=door.url) as client:
            await in_thread(talk, client)
        await door.swarm.all_closed()


@pytest.mark.parametrize("streamed", [False, True])
async def test_calls_of_tools_are_read(checkpoint: Checkpoint, streamed: bool) -> None:
    async with serve_script(checkpoint, CALL) as (url, script):

        def talk(client: Any) -> list[Any]:
            answer = client.chat("tiny-stories", STORY, tools=[TOOL], stream=streamed)
            return list(answer) if streamed else [answer]

        with ollama.Client(host=url) as client:
            told = await in_thread(talk, client)
    (call,) = [call for each in told for call in each.message.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("add", {"a": 2})
    assert "".join(each.message.content for each in told) == ""
    assert '"add"' in script.prompts[0]


async def test_errors_are_shown(open_door: OpenDoor) -> None:
    hasty = ClientConfig(dtype="float32", find_timeout_s=0.05, wait_s=0.1, max_attempts=1)
    async with open_door(config=hasty) as door:
        with ollama.Client(host=door.url) as client:
            with pytest.raises(ollama.ResponseError, match="'gpt' is not served here") as refused:
                await in_thread(client.chat, **CHAT | {"model": "gpt"})
            assert refused.value.status_code == 404
            with pytest.raises(ollama.ResponseError, match="mirostat is not supported: use top_p"):
                await in_thread(client.chat, **CHAT | {"options": {"mirostat": 2}})
            with pytest.raises(ollama.ResponseError, match="there is no /api/pull here; there are /api/chat"):
                await in_thread(client.pull, "llama3")

            def begin() -> Any:
                pieces = client.chat(**CHAT | {"options": {"num_predict": 900}}, stream=True)
                next(pieces)
                return pieces

            pieces = await in_thread(begin)
            await door.swarm.network.kill("b")
            with pytest.raises(ollama.ResponseError):
                await in_thread(list, pieces)
