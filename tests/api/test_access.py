"""Who may call: keys, names and pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.api.access import ANYBODY, Access, load_keys
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.errors import ApiError
from p2pinfer.errors import ConfigError

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.0.2.7",
        "api.localhost",
        "me.example:1",
    ],
)
def test_a_name_that_is_ours_and_every_address_are_known(host: str) -> None:
    Access((), ApiConfig(host_names=("Me.example",))).check_page({"host": host})


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8000", "", "127.0.0.1.evil.example"]
)
def test_a_page_whose_name_was_made_to_lead_here_is_refused(host: str) -> None:
    with pytest.raises(ApiError, match=r"api\.host_names"):
        Access((), ApiConfig()).check_page({"host": host})


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:9999", ""])
def test_a_page_of_elsewhere_may_not_call(origin: str) -> None:
    with pytest.raises(ApiError, match=r"api\.origins"):
        Access((), ApiConfig()).check_page({"host": "localhost:8000", "origin": origin})


def test_a_page_that_is_allowed_may_read_and_so_may_our_own() -> None:
    access = Access((), ApiConfig(origins=("https://chat.example/",)))
    for origin in ("https://chat.example", "http://localhost:8000"):
        headers = {"host": "localhost:8000", "origin": origin}
        access.check_page(headers)
        assert access.allowed_origin(headers) == origin
    assert access.allowed_origin({"host": "localhost:8000"}) is None


def test_a_key_is_taken_by_either_header() -> None:
    access = Access((KEY, "f" * 16), ApiConfig())
    assert access.check_key({"authorization": f"Bearer {KEY}"}) == KEY
    assert access.check_key({"x-api-key": "f" * 16}) == "f" * 16
    for wrong in ({}, {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY[:-1]}, {"x-api-key": "\xe9" * 16}):
        with pytest.raises(ApiError, match="missing or wrong"):
            access.check_key(wrong)
    assert Access((), ApiConfig()).check_key({"authorization": "Bearer whatever"}) is ANYBODY


def test_keys_are_read_from_the_file_and_others_reach_nothing_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{KEY}\n\n{'f' * 16}\n")
    file.chmod(0o600)
    assert load_keys(ApiConfig(host="0.0.0.0", key_file=file)) == (KEY, "f" * 16)
    assert not caplog.messages
    file.chmod(0o644)
    load_keys(ApiConfig(key_file=file))
    assert "can be read by every user" in caplog.text
    assert load_keys(ApiConfig(host="::1")) == load_keys(ApiConfig(host="localhost")) == ()
    for host in ("0.0.0.0", "192.0.2.7", "my.example"):
        with pytest.raises(ConfigError, match=f"others can reach {host}, so a key is required"):
            load_keys(ApiConfig(host=host))


@pytest.mark.parametrize(
    ("content", "says"),
    [("# none\n", "holds no API key"), ("short\n", "shorter than 16"), ("\u00e9" * 16, "others than ASCII")],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "keys").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        load_keys(ApiConfig(key_file=tmp_path / "keys"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(ApiConfig(key_file=tmp_path / "none"))
