"""Where settings come from, and what is said when they cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import platformdirs
import pytest

from p2pinfer.config import (
    SECTIONS,
    Flag,
    SharedConfig,
    describe_type,
    environment_without_settings,
    load_settings,
    section_of,
    variable_of,
)
from p2pinfer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Stands for a layer, with a field of every type that a setting may have."""

    limit: int = 8
    wait_s: float = 2.5
    generous: bool = False
    codec: Literal["plain", "packed"] = "plain"
    name: str = ""
    seed: int | None = None
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    bootstrap: tuple[str, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict[int, float])

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit is {self.limit}; it cannot be negative")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of whoever runs the tests."""
    for kind in ("data", "config", "cache"):
        folder = tmp_path / kind
        folder.mkdir()
        monkeypatch.setattr(platformdirs, f"user_{kind}_dir", {"p2pinfer": str(folder)}.__getitem__)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_word_the_dataclass_decides() -> None:
    assert load_settings(ServeConfig, environ={}).build(ServeConfig) == ServeConfig()


def test_file_variable_and_flag_each_overrule_the_one_before(tmp_path: Path) -> None:
    file = write(tmp_path / "own.toml", "[serve]\nlimit = 1\nwait_s = 1\nname = 'file'\n")
    settings = load_settings(
        ServeConfig,
        file=file,
        environ={"P2PINFER_SERVE__LIMIT": "2", "P2PINFER_SERVE__WAIT_S": "2"},
        flags={"serve.limit": Flag("--limit", "3")},
    )
    assert settings.build(ServeConfig) == ServeConfig(limit=3, wait_s=2.0, name="file")
    assert settings["serve.limit"].origin == "--limit"
    assert settings["serve.wait_s"].origin == "$P2PINFER_SERVE__WAIT_S"
    assert settings["serve.name"].origin == str(file)
    assert settings["serve.seed"].origin == "default"


def test_a_table_is_written_as_pairs_or_as_toml(tmp_path: Path) -> None:
    file = write(tmp_path / "own.toml", "[serve]\nbias = {5 = 1, 6 = -2.5}\n")
    settings = load_settings(ServeConfig, file=file, environ={})
    assert settings.build(ServeConfig).bias == {5: 1.0, 6: -2.5}
    again = write(tmp_path / "again.toml", settings.to_toml())
    assert load_settings(ServeConfig, file=again, environ={}).build(ServeConfig).bias == {5: 1.0, 6: -2.5}
    said = {"P2PINFER_SERVE__BIAS": "5=-inf, 7=1"}
    assert load_settings(ServeConfig, environ=said).build(ServeConfig).bias == {5: -float("inf"), 7: 1.0}
    flags = {"serve.bias": Flag("--bias", ("5=2", "8=-1"))}
    assert load_settings(ServeConfig, environ=said, flags=flags).build(ServeConfig).bias == {5: 2.0, 8: -1.0}


@pytest.mark.parametrize("wrong", ["5", "a=1", "5=b", "5=1=2"])
def test_what_is_no_pair_is_named(wrong: str) -> None:
    with pytest.raises(
        ConfigError, match=r"serve\.bias must be pairs of a whole number and a number, written"
    ):
        load_settings(ServeConfig, environ={}, flags={"serve.bias": Flag("--bias", (wrong,))})


def test_a_shared_setting_reaches_every_layer_that_has_it() -> None:
    settings = load_settings(ServeConfig, environ={"P2PINFER_BOOTSTRAP": "/ip4/192.0.2.1/tcp/1"})
    assert settings.build(ServeConfig).bootstrap == ("/ip4/192.0.2.1/tcp/1",)
    assert settings.build(SharedConfig).bootstrap == ("/ip4/192.0.2.1/tcp/1",)
    assert settings.shared()["bootstrap"] == ("/ip4/192.0.2.1/tcp/1",)


@pytest.mark.parametrize("written", ["/a, /b", "/a /b", " /a\n/b ", '["/a", "/b"]'])
def test_a_list_in_a_variable_is_separated_by_commas_or_spaces_or_is_toml(written: str) -> None:
    settings = load_settings(ServeConfig, environ={"P2PINFER_SERVE__LISTEN": written})
    assert settings.build(ServeConfig).listen == ("/a", "/b")


def test_a_repeated_flag_is_taken_as_it_is() -> None:
    settings = load_settings(
        ServeConfig, environ={}, flags={"serve.listen": Flag("--listen", ("a, b", "c d"))}
    )
    assert settings.build(ServeConfig).listen == ("a, b", "c d")


def test_an_empty_variable_says_nothing() -> None:
    assert load_settings(ServeConfig, environ={"P2PINFER_SERVE__LIMIT": ""})["serve.limit"].value == 8


def test_a_path_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/fox")
    settings = load_settings(environ={"P2PINFER_DATA_DIR": "~/den"})
    assert settings["data_dir"].value == Path("/home/fox/den")


def test_config_toml_is_found_in_the_data_directory_before_the_config_folder(tmp_path: Path) -> None:
    write(tmp_path / "config" / "config.toml", "model = 'from config'")
    assert load_settings(environ={})["model"].value == "from config"
    write(tmp_path / "data" / "config.toml", "model = 'from data'")
    assert load_settings(environ={})["model"].value == "from data"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere / "config.toml", "model = 'from elsewhere'")
    assert load_settings(environ={"P2PINFER_DATA_DIR": str(elsewhere)})["model"].value == "from elsewhere"
    flags = {"data_dir": Flag("--data-dir", str(elsewhere))}
    assert load_settings(environ={}, flags=flags)["model"].value == "from elsewhere"


def test_a_variable_can_name_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "own.toml", "model = 'own'")
    assert load_settings(environ={"P2PINFER_CONFIG": str(file)})["model"].value == "own"


def test_a_named_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml does not exist"):
        load_settings(environ={}, file=tmp_path / "nothing.toml")


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    said = {"P2PINFER_SERVE__NAME": 'a "quoted" näme\n', "P2PINFER_SERVE__GENEROUS": "true"}
    settings = load_settings(ServeConfig, environ=said)
    printed = settings.to_toml()
    assert "# seed is not set  # default" in printed
    assert "generous = true  # $P2PINFER_SERVE__GENEROUS" in printed
    again = load_settings(ServeConfig, environ={}, file=write(tmp_path / "printed.toml", printed))
    assert again.build(ServeConfig) == settings.build(ServeConfig)
    assert again.build(SharedConfig) == settings.build(SharedConfig)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle = 'x'", r"there is no setting modle; did you mean model\?"),
        ("[serve]\nlimt = 1", r"there is no setting serve\.limt; did you mean serve\.limit\?"),
        ("[serve]\nzzzzzzzz = 1", r"there is no setting serve\.zzzzzzzz; --print-config lists"),
        ("[serv]\nlimit = 1", r"there is no setting \[serv\]; did you mean \[serve\]\?"),
        ("[serve]\nlimit = '1'", r"serve\.limit must be a whole number, not '1'"),
        ("[serve]\nlimit = 1.5", r"serve\.limit must be a whole number, not 1\.5"),
        ("[serve]\nwait_s = nan", r"serve\.wait_s must be a finite number, not nan"),
        ("[serve]\nlisten = '/a'", r"serve\.listen must be a list of texts, not '/a'"),
        ("[serve]\ncodec = 'other'", r"serve\.codec must be one of plain, packed, not 'other'"),
        ("data_dir = 1", r"data_dir must be a path, not 1"),
        ("limit", r"own\.toml: Expected '='"),
        (f"[serve]\nlimit = '{'x' * 200}'", r"not 'x{56}\.\.\."),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file(tmp_path: Path, text: str, complaint: str) -> None:
    file = write(tmp_path / "own.toml", text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_settings(ServeConfig, environ={}, file=file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        (
            "P2PINFER_SERVE__LIMT",
            "1",
            r"no setting P2PINFER_SERVE__LIMT; did you mean P2PINFER_SERVE__LIMIT\?",
        ),
        ("P2PINFER_MODLE", "x", r"no setting P2PINFER_MODLE; did you mean P2PINFER_MODEL\?"),
        (
            "P2PINFER_SERVE__LIMIT",
            "x",
            r"\$P2PINFER_SERVE__LIMIT: serve\.limit must be a whole number, not 'x'",
        ),
        ("P2PINFER_SERVE__SEED", "x", r"serve\.seed must be a whole number, not 'x'"),
        ("P2PINFER_SERVE__GENEROUS", "perhaps", r"serve\.generous must be true or false, not 'perhaps'"),
        ("P2PINFER_SERVE__LISTEN", "[1", r"serve\.listen is not a TOML array"),
        ("P2PINFER_SERVE__LISTEN", "[1]", r"serve\.listen must be a list of texts"),
    ],
)
def test_a_mistake_in_a_variable_is_named_with_the_variable(
    variable: str, value: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_settings(ServeConfig, environ={variable: value})


def test_a_mistake_in_a_flag_is_named_with_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"--limit: serve\.limit must be a whole number, not 'x'"):
        load_settings(ServeConfig, environ={}, flags={"serve.limit": Flag("--limit", "x")})
    with pytest.raises(ConfigError, match=r"--set: there is no setting serve\.limt"):
        load_settings(ServeConfig, environ={}, flags={"serve.limt": Flag("--set", "1")})
    with pytest.raises(ConfigError, match=r"--set: there is no setting modle"):
        load_settings(ServeConfig, environ={}, flags={"modle": Flag("--set", "1")})


def test_settings_of_layers_that_a_command_does_not_use_are_left_unread(tmp_path: Path) -> None:
    file = write(tmp_path / "own.toml", "[generation]\nanything = 1\n")
    environ = {"P2PINFER_GENERATION__ANYTHING": "1"}
    load_settings(ServeConfig, environ=environ, file=file)


def test_what_a_layer_refuses_is_named_with_its_section() -> None:
    settings = load_settings(ServeConfig, environ={"P2PINFER_SERVE__LIMIT": "-1"})
    with pytest.raises(ConfigError, match=r"\[serve\] limit is -1; it cannot be negative"):
        settings.build(ServeConfig)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "latin.toml"
    file.write_bytes(b"model = '\xe4'")
    with pytest.raises(ConfigError, match=r"latin\.toml: "):
        load_settings(environ={}, file=file)


def test_a_childs_environment_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PINFER_MODEL", "x")
    monkeypatch.setenv("NOT_OURS", "x")
    environment = environment_without_settings()
    assert "P2PINFER_MODEL" not in environment
    assert environment["NOT_OURS"] == "x"


def test_names_follow_from_one_another() -> None:
    assert section_of(ServeConfig) == "serve"
    assert section_of(ServeConfig) in SECTIONS
    assert variable_of("serve.max_sessions") == "P2PINFER_SERVE__MAX_SESSIONS"
    assert describe_type(int | None) == "a whole number"
