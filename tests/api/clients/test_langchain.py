"""langchain-openai against a real `p2pinfer serve`. `make clients` installs it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from .conftest import Serving

langchain_openai: Any = pytest.importorskip("langchain_openai", reason="langchain-openai; see `make clients`")
messages: Any = pytest.importorskip("langchain_core.messages")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its own warnings are not ours

PROMPT = "Once upon a time"
TEXT = ", there was a little girl named Lily. She loved to play"
SCHEMA: dict[str, Any] = {
    "title": "choose",
    "description": "Chooses.",
    "type": "object",
    "properties": {"hero": {"type": "string", "enum": ["girl", "dog"]}},
    "required": ["hero"],
    "additionalProperties": False,
}


def chat_of(serving: Serving, **options: Any) -> Any:
    options = {"max_tokens": 13, "max_retries": 0, "api_key": serving.key, "model": serving.model} | options
    return langchain_openai.ChatOpenAI(base_url=f"{serving.url}/v1", **options)


def test_chats_are_answered_whole_and_in_pieces(serving: Serving) -> None:
    chat = chat_of(serving)
    assert [each.id for each in chat.root_client.models.list()] == [serving.model]
    answer = chat.invoke(PROMPT)
    assert answer.content == TEXT
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata["output_tokens"] == 13
    pieces = list(chat_of(serving, stream_usage=True).stream(PROMPT))
    assert "".join(piece.content for piece in pieces) == TEXT
    assert len(pieces) > 5
    assert [each.usage_metadata["output_tokens"] for each in pieces if each.usage_metadata] == [13]
    completion = langchain_openai.OpenAI(
        base_url=f"{serving.url}/v1", api_key=serving.key, model=serving.model, max_tokens=13, temperature=0
    )
    assert completion.invoke(PROMPT) == TEXT


def test_it_can_stop_early(serving: Serving) -> None:
    stopped = chat_of(serving, max_tokens=50).invoke(PROMPT, stop=[" named"])
    assert stopped.content == ", there was a little girl"
    pieces = chat_of(serving, max_tokens=2500).stream(PROMPT)
    next(pieces)
    pieces.close()
    serving.wait_until_nobody_is_served()


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_are_called(serving: Serving, streamed: bool) -> None:
    chat = chat_of(serving, max_tokens=250).bind_tools([SCHEMA], tool_choice="required")
    if streamed:
        first, *others = chat.stream(PROMPT)
        message: Any = sum(others, start=first)
    else:
        message = chat.invoke(PROMPT)
    (call,) = message.tool_calls
    assert call["name"] == "choose"
    assert call["args"]["hero"] in ("girl", "dog")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "yes"}
    assert chat_of(serving).invoke([("user", PROMPT), message, result]).usage_metadata["output_tokens"] == 13


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_have_a_form(serving: Serving, method: str) -> None:
    chat = chat_of(serving, max_tokens=250).with_structured_output(SCHEMA, method=method, strict=True)
    assert chat.invoke(PROMPT)["hero"] in ("girl", "dog")


def test_log_probabilities_and_several_answers(serving: Serving) -> None:
    logs = chat_of(serving, logprobs=True, top_logprobs=2).invoke(PROMPT).response_metadata["logprobs"]
    assert "".join(entry["token"] for entry in logs["content"]) == TEXT
    assert all(len(entry["top_logprobs"]) == 2 for entry in logs["content"])
    (answers,) = (
        chat_of(serving, n=2, temperature=1.0, seed=7).generate([[messages.HumanMessage(PROMPT)]]).generations
    )
    assert len({answer.text for answer in answers}) == 2


def test_errors_are_the_ones_that_it_knows(serving: Serving) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here"):
        chat_of(serving, model="gpt-5").invoke(PROMPT)
    with pytest.raises(openai.BadRequestError, match="presence_penalty is not supported"):
        chat_of(serving, presence_penalty=1.0).invoke(PROMPT)
    with pytest.raises(openai.AuthenticationError):
        chat_of(serving, api_key="another").invoke(PROMPT)
    with pytest.raises(Exception, match="context of tiny-chat is 1024"):
        list(chat_of(serving).stream("word " * 2000))
    embeddings = langchain_openai.OpenAIEmbeddings(
        base_url=f"{serving.url}/v1",
        api_key=serving.key,
        model=serving.model,
        check_embedding_ctx_length=False,
    )
    with pytest.raises(openai.BadRequestError, match="has no embeddings"):
        embeddings.embed_query("text")
