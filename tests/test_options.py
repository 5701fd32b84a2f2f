"""What users of Python are told of arguments, by their editor and when one is wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from importlib.metadata import version
from typing import Any, cast

import pytest

import p2pinfer
from p2pinfer.client_config import GenerationConfig
from p2pinfer.options import ClientOptions, GenerationOptions, addresses_of

ADDRESS = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"
client: Any = p2pinfer.Client  # what follows is wrong on purpose
connect: Any = p2pinfer.connect


def test_what_editors_complete_is_what_there_is() -> None:
    fields = {each.name: each.type for each in dataclasses.fields(GenerationConfig)}
    assert list(GenerationOptions.__annotations__) == list(fields)
    named = set(inspect.signature(p2pinfer.Client).parameters)
    own = {"model", "bootstrap", "policy", "host_config"}
    assert set(ClientOptions.__annotations__) == named - own
    assert own < set(inspect.signature(p2pinfer.connect).parameters)


def test_every_argument_of_a_client_is_documented() -> None:
    documented = inspect.getdoc(p2pinfer.Client) or ""
    for name in inspect.signature(p2pinfer.Client).parameters:
        assert f"\n    {name}: " in documented, name


def test_the_version_is_that_of_the_distribution() -> None:
    assert p2pinfer.__version__ == version("p2pinfer")


@pytest.mark.parametrize("function", [client, connect])
@pytest.mark.parametrize(
    ("name", "nearest"), [("modle", "model"), ("bootstraps", "bootstrap"), ("data_dri", "data_dir")]
)
def test_a_wrong_name_is_told_the_nearest(function: Any, name: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"takes no argument '{name}'; did you mean '{nearest}'\\?"):
        function(**{name: "x"})


def test_a_name_like_none_is_told_as_it_is() -> None:
    with pytest.raises(TypeError, match=r"^Client\(\) takes no argument 'xyzzy'$"):
        client(xyzzy=1)


def test_one_address_may_be_given_as_it_is() -> None:
    assert addresses_of(ADDRESS) == addresses_of([ADDRESS]) == (ADDRESS,)
    with pytest.raises(TypeError, match="bootstrap holds 7; it takes multiaddrs as text"):
        addresses_of(cast("Any", [7]))


async def test_a_prompt_is_one_text_and_a_client_is_opened_first() -> None:
    unopened = client()
    for prompt, complaint in (
        (["Once", "Twice"], "the prompt is a list; call generate once for each text"),
        ([{"role": "user", "content": "Hi"}], "join the messages of a chat"),
        (b"Once", "the prompt is of type bytes; it must be a str"),
        (None, "the prompt is of type NoneType"),
    ):
        with pytest.raises(TypeError, match=complaint):
            unopened.generate(prompt)
    with pytest.raises(p2pinfer.LocalError, match="this client is not open yet: async with"):
        unopened.generate("Once")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_asyncio_it_says_what_to_use() -> None:
    async def main() -> None:
        async with p2pinfer.Client():
            pass

    with pytest.raises(p2pinfer.LocalError, match=r"Client needs trio.*p2pinfer\.connect\(\) in a thread"):
        asyncio.run(main())


def test_a_field_that_does_not_exist_is_told_the_nearest() -> None:
    from p2pinfer.generation.first_state import generation_config

    with pytest.raises(p2pinfer.ConfigError, match="did you mean 'max_new_tokens'"):
        generation_config(None, {"max_tokens": 3})
    with pytest.raises(p2pinfer.ConfigError, match="did you mean 'temperature'"):
        generation_config(None, {"temprature": 1.0})
