"""openai, anthropic and ollama for Python against a real `p2pinfer serve`.

The tests of each client beside this folder go into more depth, over a swarm in memory.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest

from .conftest import Serving

openai: Any = pytest.importorskip("openai")
anthropic: Any = pytest.importorskip("anthropic")
ollama: Any = pytest.importorskip("ollama")
pytestmark = pytest.mark.slow

STORY = [{"role": "user", "content": "Once upon a time"}]
TEXT = ", there was a little girl named Lily. She loved to play"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"hero": {"type": "string", "enum": ["girl", "dog"]}},
    "required": ["hero"],
    "additionalProperties": False,
}
CHOOSE: dict[str, Any] = {"type": "function", "function": {"name": "choose", "parameters": SCHEMA}}


def is_hero(said: Any) -> bool:
    told = json.loads(said) if isinstance(said, str) else said
    return list(told) == ["hero"] and told["hero"] in ("girl", "dog")


@pytest.fixture
def openai_client(serving: Serving) -> Generator[Any]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key=serving.key, max_retries=0) as client:
        yield client


def test_openai(serving: Serving, openai_client: Any) -> None:
    asked: dict[str, Any] = {"model": serving.model, "messages": STORY, "max_tokens": 13}
    create = openai_client.chat.completions.create
    assert [model.id for model in openai_client.models.list()] == [serving.model]
    assert create(**asked).choices[0].message.content == TEXT
    with openai_client.chat.completions.stream(**asked) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == TEXT
        with pytest.raises(openai.LengthFinishReasonError):  # what this helper calls a text that was cut
            stream.get_final_completion()
    stream = create(**asked | {"max_tokens": 2500}, stream=True)
    next(stream)
    stream.close()
    serving.wait_until_nobody_is_served()
    called = create(**asked | {"max_tokens": 250}, tools=[CHOOSE], tool_choice="required").choices[0]
    assert is_hero(called.message.tool_calls[0].function.arguments)
    form = {"type": "json_schema", "json_schema": {"name": "hero", "schema": SCHEMA, "strict": True}}
    assert is_hero(create(**asked | {"max_tokens": 250}, response_format=form).choices[0].message.content)
    logs = create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(entry.token for entry in logs) == TEXT
    both = create(**asked, n=2, temperature=1, seed=7).choices
    assert len({choice.message.content for choice in both}) == 2
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here"):
        create(**asked | {"model": "gpt-5"})
    with pytest.raises(openai.AuthenticationError):
        openai_client.with_options(api_key="another").models.list()


def test_anthropic(serving: Serving) -> None:
    asked: dict[str, Any] = {"model": serving.model, "messages": STORY, "max_tokens": 13}
    tool = {"name": "choose", "input_schema": SCHEMA}
    with anthropic.Anthropic(base_url=serving.url, api_key=serving.key, max_retries=0) as client:
        create = client.messages.create
        assert [model.id for model in client.models.list()] == [serving.model]
        assert create(**asked).content[0].text == TEXT
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == TEXT
        with client.messages.stream(**asked | {"max_tokens": 2500}) as stream:
            next(iter(stream.text_stream))
        serving.wait_until_nobody_is_served()
        called = create(**asked | {"max_tokens": 250}, tools=[tool], tool_choice={"type": "any"})
        assert is_hero(called.content[-1].input)
        form = {"format": {"type": "json_schema", "schema": SCHEMA}}
        assert is_hero(create(**asked | {"max_tokens": 250}, output_config=form).content[0].text)
        # This API has no fields for them, so they are unknown rather than ignored.
        for wish in ({"n": 2}, {"logprobs": True}):
            with pytest.raises(anthropic.BadRequestError, match="is not a field that this server knows"):
                create(**asked, extra_body=wish)
        with pytest.raises(anthropic.NotFoundError, match="'claude' is not served here"):
            create(**asked | {"model": "claude"})
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="another").messages.create(**asked)


def test_ollama(serving: Serving) -> None:
    asked: dict[str, Any] = {"model": serving.model, "messages": STORY, "options": {"num_predict": 13}}
    headers = {"Authorization": f"Bearer {serving.key}"}
    with ollama.Client(host=serving.url, headers=headers) as client:
        assert [model.model for model in client.list().models] == [serving.model]
        assert client.chat(**asked).message.content == TEXT
        assert "".join(piece.message.content for piece in client.chat(**asked, stream=True)) == TEXT
        pieces = client.chat(**asked | {"options": {"num_predict": 2500}}, stream=True)
        next(pieces)
        pieces.close()
        serving.wait_until_nobody_is_served()
        longer = asked | {"options": {"num_predict": 250}}
        assert is_hero(client.chat(**longer, format=SCHEMA).message.content)
        assert client.chat(**asked, tools=[CHOOSE]).prompt_eval_count > 30
        logs = client.chat(**asked, logprobs=True, top_logprobs=2).logprobs
        assert "".join(entry.token for entry in logs) == TEXT
        with pytest.raises(ollama.ResponseError, match="'gpt' is not served here") as refused:
            client.chat(**asked | {"model": "gpt"})
        assert refused.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="has no embeddings") as refused:
            client.embed(serving.model, "text")
        assert refused.value.status_code == 400
    with ollama.Client(host=serving.url) as stranger, pytest.raises(ollama.ResponseError) as refused:
        stranger.list()
    assert refused.value.status_code == 401
