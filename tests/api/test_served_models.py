"""Several models behind one address: each is listed, and a request's name picks one."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig, check_identity
from p2pinfer.api.errors import ApiError
from p2pinfer.api.http_server import serve_http
from p2pinfer.api.openai.objects import model_list, model_object
from p2pinfer.api.served_models import ServedModels
from p2pinfer.errors import ConfigError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.routing.announcement import OfferedAdapter

from .scripted import Script

NAMES = ("one/teller", "two/teller", "poet")


def scripts(checkpoint: Checkpoint, *names: str) -> list[Script]:
    """Models of these names, each of which answers with its name."""
    tokenizer = load_tokenizer(checkpoint.folder)
    return [Script(replace(checkpoint.spec, model=name), tokenizer, f"I am {name}.") for name in names]


def named(checkpoint: Checkpoint, *names: str, offers: Sequence[OfferedAdapter] = ()) -> ServedModels:
    def adapters(spec: ModelSpec) -> Sequence[OfferedAdapter]:
        return offers if spec.model == names[-1] else ()

    return ServedModels(scripts(checkpoint, *names), ApiConfig(), adapters)


@asynccontextmanager
async def serve(
    sources: Sequence[Script], adapters: Callable[[ModelSpec], Sequence[OfferedAdapter]] = lambda _: ()
) -> AsyncGenerator[httpx.AsyncClient]:
    """Those models behind one address."""
    config = ApiConfig(port=0)
    async with open_nursery() as nursery:
        app = App(sources, config, adapters=adapters)
        ((_, port),) = await nursery.start(serve_http, app.handle, config)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as asking:
            yield asking


async def test_each_model_is_listed_by_every_dialect_and_answers_to_its_name(checkpoint: Checkpoint) -> None:
    question: list[dict[str, str]] = [{"role": "user", "content": "Who are you?"}]
    async with serve(scripts(checkpoint, *NAMES)) as asking:

        async def ask(path: str, **wish: Any) -> Any:
            return (await asking.post(path, json=wish)).raise_for_status().json()

        listed = (await asking.get("/v1/models")).json()["data"]
        assert [each["id"] for each in listed] == list(NAMES)
        anthropic = (await asking.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
        assert [each["id"] for each in anthropic["data"]] == list(NAMES)
        assert (anthropic["first_id"], anthropic["last_id"]) == (NAMES[0], NAMES[-1])
        for path in ("/api/tags", "/api/ps"):
            told = (await asking.get(path)).json()["models"]
            assert [each["name"] for each in told] == list(NAMES)
        for name in NAMES:
            said = f"I am {name}."
            chat = await ask("/v1/chat/completions", model=name, messages=question)
            assert (chat["model"], chat["choices"][0]["message"]["content"]) == (name, said)
            assert (await ask("/v1/completions", model=name, prompt="So"))["model"] == name
            assert (await ask("/v1/responses", model=name, input="So"))["model"] == name
            message = await ask("/v1/messages", model=name, messages=question, max_tokens=50)
            assert message["content"][0]["text"] == said
            lines = await ask("/api/chat", model=f"{name}:latest", messages=question, stream=False)
            assert lines["message"]["content"] == said
            assert (await ask("/api/show", name=name))["model_info"]
            assert (await asking.get(f"/v1/models/{name}")).json()["id"] == name


async def test_what_no_model_is_called_is_refused_with_the_names_that_there_are(
    checkpoint: Checkpoint,
) -> None:
    async with serve(scripts(checkpoint, *NAMES)) as asking:
        for model, says in (
            ("gpt", "the model 'gpt' is not served here; this server has 'one/teller', 'two/teller', 'poet'"),
            ("teller", "the model 'teller' can be 'one/teller' or 'two/teller'"),
        ):
            refused = await asking.post("/v1/chat/completions", json={"model": model, "messages": []})
            assert (refused.status_code, refused.json()["error"]["message"]) == (404, says)
            assert refused.json()["error"]["code"] == "model_not_found"
        for body in ("", "[]", '{"model": 1}', '{"messages": []}'):
            refused = await asking.post("/v1/chat/completions", content=body)
            assert refused.status_code == 400, refused.text
        refused = await asking.post("/v1/embeddings", json={"model": "poet", "input": "So"})
        assert refused.json()["error"]["message"].startswith("poet has no embeddings: it is a decoder-only")


def test_the_whole_name_goes_before_the_last_part_of_another(checkpoint: Checkpoint) -> None:
    models = named(checkpoint, "one/poet", "poet")
    assert models.named("poet").model.id == "poet"
    assert models.named("poet:latest").model.id == "poet"
    assert models.named("one/poet").model.id == "one/poet"
    body = json.dumps({"model": "one/poet"}).encode()
    assert models.asked(body).model.id == "one/poet"
    assert models.asked(b"{}").model.id == "one/poet"


def test_adapters_are_listed_with_their_parent_and_are_names_of_it(checkpoint: Checkpoint) -> None:
    offers = [OfferedAdapter(b"s" * 32, "sonnets", 9), OfferedAdapter(b"t" * 32, "poet", 9)]
    models = named(checkpoint, "teller", "poet", offers=offers)
    told = [(each["id"], each.get("root"), each.get("parent")) for each in model_list(models.listed)["data"]]
    adapters = [("73" * 16, "sonnets", "poet"), ("74" * 16, "poet", "poet")]
    assert told == [("teller", None, None), ("poet", None, None), *adapters]
    for name in ("sonnets", "73" * 16):
        assert models.named(name).model.id == "73" * 16
    assert models.named("poet").model.adapter is None  # whatever a stranger calls an adapter
    tuned = model_object(models.named("74" * 16).model)
    assert (tuned["id"], tuned["parent"], tuned["max_model_len"]) == ("74" * 16, "poet", 1024)


def test_an_adapter_whose_name_several_have_is_asked_for_by_its_id(checkpoint: Checkpoint) -> None:
    offers = [OfferedAdapter(b"s" * 32, "sonnets", 9), OfferedAdapter(b"t" * 32, "sonnets", 9)]
    models = named(checkpoint, "poet", offers=offers)
    with pytest.raises(ApiError, match=f"the model 'sonnets' can be '{'73' * 16}' or '{'74' * 16}'"):
        models.named("sonnets")
    assert models.named("74" * 16).model.adapter == offers[1]


async def test_a_request_for_an_adapter_fetches_it_once_and_is_answered_with_it(
    checkpoint: Checkpoint,
) -> None:
    offer = OfferedAdapter(b"s" * 32, "sonnets", 9)
    (script,) = scripts(checkpoint, "poet")
    async with serve([script], lambda _: [offer]) as asking:
        wish = {"model": "sonnets", "messages": [{"role": "user", "content": "Who are you?"}]}
        answers: list[Any] = []

        async def ask() -> None:
            answered = await asking.post("/v1/chat/completions", json=wish)
            answers.append(answered.raise_for_status().json())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert len(answers) == 3
        for answer in answers:
            assert answer["model"] == offer.id
            assert answer["choices"][0]["message"]["content"] == "[7373] I am poet."
        plain = (await asking.post("/v1/chat/completions", json=wish | {"model": "poet"})).json()
        assert plain["choices"][0]["message"]["content"] == "I am poet."
    assert script.loaded == [offer.id]


def test_models_that_no_request_could_tell_apart_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="two of the models are called 'poet'"):
        named(checkpoint, "poet", "teller", "poet")


def test_one_identity_serves_one_model() -> None:
    check_identity(["poet"], Path("me.key"))
    check_identity(["poet", "teller"], None)
    with pytest.raises(
        ConfigError, match=r"a permanent identity .* is one client's, and 2 models need as many"
    ):
        check_identity(["poet", "teller"], Path("me.key"))
