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
        ([{"role": "user", "content": "Hi"}], r"client\.chat_template\.render\(messages\) makes of a chat"),
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

    with pytest.raises(p2pinfer.LocalError, match=r"Client needs trio.*p2pinfer\.connect_asyncio\(\) there"):
        asyncio.run(main())


def test_a_field_that_does_not_exist_is_told_the_nearest() -> None:
    from p2pinfer.generation.first_state import generation_config

    with pytest.raises(p2pinfer.ConfigError, match="did you mean 'max_new_tokens'"):
        generation_config(None, {"max_tokens": 3})
    with pytest.raises(p2pinfer.ConfigError, match="did you mean 'temperature'"):
        generation_config(None, {"temprature": 1.0})


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        # Not an error to any comparison, and no message that peers can read.
        ("max_new_tokens", 5.0, r"max_new_tokens is 5\.0; it must be a whole number"),
        ("max_new_tokens", "5", "max_new_tokens is '5'; it must be a whole number"),
        ("max_new_tokens", True, "max_new_tokens is True; it must be a whole number"),
        ("temperature", "hot", "temperature is 'hot'; it must be a number"),
        ("seed", "a", "seed is 'a'; it must be a whole number"),
        ("stop", "girl", "stop is 'girl'; it must be a list of texts"),
        ("stop", ["girl", 3], r"stop is \['girl', 3\]; it must be a list of texts"),
        ("stop_ids", 5, "stop_ids is 5; it must be a list of whole numbers"),
        ("logit_bias", [1, 2], r"logit_bias is \[1, 2\]; it must be pairs of a whole number and a number"),
        ("logit_bias", {"5": 1}, r"logit_bias is \{'5': 1\}; it must be pairs of a whole number"),
        ("show_special", 1, "show_special is 1; it must be true or false"),
    ],
)
def test_a_field_of_another_type_is_told_what_it_takes(field: str, value: object, complaint: str) -> None:
    with pytest.raises(p2pinfer.ConfigError, match=complaint):
        GenerationConfig(**cast("Any", {field: value}))


def test_a_whole_number_is_a_number_and_a_list_may_stand_for_a_tuple() -> None:
    config = GenerationConfig(temperature=1, stop=cast("Any", ["a"]), logit_bias={5: -1}, seed=None)
    assert (config.temperature, list(config.stop), config.logit_bias) == (1, ["a"], {5: -1})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"policy": p2pinfer.RoutingPolicy}, "takes str or RoutingPolicy, and this is a class: call it"),
        ({"policy": 5}, "policy is 5; it takes str or RoutingPolicy"),
        ({"model": None}, "model is None; it takes str or Path"),
        ({"bootstrap": None}, "bootstrap is None; it takes multiaddrs as text"),
        ({"bootstrap": 5}, "bootstrap is 5; it takes multiaddrs as text"),
        ({"config": {"wait_s": 3}}, r"config is \{'wait_s': 3\}; it takes ClientConfig"),
        ({"config": {}}, r"config is \{\}; it takes ClientConfig"),
        ({"host_config": "x"}, "host_config is 'x'; it takes HostConfig"),
        ({"data_dir": 3}, "data_dir is 3; it takes str or Path"),
        ({"on_wait": "x"}, "on_wait is 'x'; it takes a function"),
        ({"on_event": 1}, "on_event is 1; it takes a function"),
    ],
)
@pytest.mark.parametrize("function", [client, connect])
def test_an_argument_of_another_type_is_told_what_it_takes(
    function: Any, given: dict[str, object], complaint: str
) -> None:
    with pytest.raises(TypeError, match=complaint):
        function(**given)


def test_a_generation_takes_no_dict_and_a_resume_token_is_text() -> None:
    unopened = client()
    with pytest.raises(TypeError, match=r"config is \{'seed': 1\}; it takes GenerationConfig"):
        unopened.generate("Once", {"seed": 1})
    with pytest.raises(TypeError, match="token is 5; it takes str"):
        unopened.resume(5)
