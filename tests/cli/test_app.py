"""What every command understands, and how it says no."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from p2pinfer.api.config import ApiConfig
from p2pinfer.cli.app import app, run
from p2pinfer.cli.commands.generate import POLICIES
from p2pinfer.cli.completing import complete_settings
from p2pinfer.cli.invocation import DTYPES, SettingOption
from p2pinfer.client import ClientConfig
from p2pinfer.client_config import AuditConfig, SessionConfig, TuneConfig
from p2pinfer.config import SHARED, SharedConfig, section_of
from p2pinfer.generation.generation import GenerationConfig
from p2pinfer.idle_audits import VerifyConfig
from p2pinfer.models.compute.target import DTYPES as COMPUTED_DTYPES
from p2pinfer.models.config import ComputeConfig
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.node import NodeConfig
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.policy import BUILT_IN_POLICIES

LAYERS = (
    SharedConfig,
    ApiConfig,
    NodeConfig,
    HostConfig,
    ComputeConfig,
    ClientConfig,
    GenerationConfig,
    AuditConfig,
    VerifyConfig,
    RelayConfig,
    ServeConfig,
    WeightsConfig,
    TuneConfig,
    SessionConfig,
    RoutingConfig,
)
COMMANDS = ("generate", "tune", "node", "swarm")


def all_settings() -> dict[str, object]:
    """Every key that a flag may have, with its default."""
    keys: dict[str, object] = {}
    for layer in LAYERS:
        prefix = "" if layer is SharedConfig else f"{section_of(layer)}."
        for field, value in dataclasses.asdict(layer()).items():
            keys[prefix + field] = value
    return keys


def setting_options() -> list[tuple[str, SettingOption]]:
    return [
        (name, option)
        for name in COMMANDS
        for option in app.commands[name].params
        if isinstance(option, SettingOption)
    ]


def test_without_arguments_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Usage: p2pinfer" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_groups_the_options_and_ends_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    said = capsys.readouterr().out
    headings = [each for each in re.findall(r"^(\w+):$", said, re.MULTILINE) if each != "Commands"]
    assert headings[0] == "Model"
    assert headings[-2:] == ["Options", "Examples"]
    assert f"  p2pinfer {name}" in said
    assert "--until-stdin-closes" not in said


def test_a_default_in_the_help_is_the_dataclasses() -> None:
    """Help may not import the layers, so it repeats a few of their defaults; this keeps them true."""
    settings = all_settings()
    checked = 0
    for _, option in setting_options():
        written = re.search(r"\[default: (\S+)\]", option.help or "")
        if written is not None and settings[option.setting] is not None:
            assert written[1] == str(settings[option.setting])
            checked += 1
    assert checked >= 7


def test_every_flag_is_a_setting_that_exists() -> None:
    settings = all_settings()
    assert {option.setting for _, option in setting_options()} <= set(settings)


def test_what_the_shell_is_offered_exists() -> None:
    assert set(POLICIES) == set(BUILT_IN_POLICIES)
    assert set(DTYPES) == {"auto", *COMPUTED_DTYPES}


def test_every_setting_is_completed() -> None:
    """Whatever docs/configuration.md has, and nothing else."""
    offered = complete_settings(click.Context(app.commands["generate"]), app.params[0], "")
    shared = {f"{layer}.{name}" for layer in map(section_of, LAYERS[1:]) for name in SHARED}
    assert {item.value for item in offered} == {f"{each}=" for each in all_settings().keys() - shared}


def test_choices_complete_as_they_are_typed() -> None:
    option = next(option for _, option in setting_options() if option.setting == "client.policy")
    context = click.Context(app.commands["generate"])
    assert [item.value for item in option.shell_complete(context, "f")] == ["fastest"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"p2pinfer {version('p2pinfer')}\n"


def test_the_shell_is_offered_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_P2PINFER_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "p2pinfer gen")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        run([])
    assert capsys.readouterr().out == "plain,generate\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("node --dtype fl", "plain,float32\nplain,float16\n"),
        ("node --data-dir ab", "dir,ab\n"),
        ("node --swarm-key ab", "file,ab\n"),
        ("generate --model ti", "plain,tiny-stories\ndir,ti\n"),
        (
            "node --set serve.max_sessions",
            "plain,serve.max_sessions=\nplain,serve.max_sessions_per_client=\n",
        ),
        ("generate --set weights_", "plain,weights_bytes=\n"),
        ("reputation ban 12D3KooWH", "plain,12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz\n"),
        ("reputation show iAg6gpz", "plain,12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz\n"),
    ],
)
def test_the_shell_is_offered_values(
    words: str, offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["reputation", "ban", "12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("_P2PINFER_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"p2pinfer {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    with pytest.raises(SystemExit):
        run([])
    assert capsys.readouterr().out == offered


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_P2PINFER_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["generat"], "No such command 'generat'"),
        (["node", "--block", "0:4"], "No such option"),
        (["node", "--set", "serve.max_sessions"], "write KEY=VALUE"),
        (["node", "--set", "serve.max_session=1"], "did you mean serve.max_sessions?"),
        (["node", "--config", "nowhere.toml"], "nowhere.toml does not exist"),
        (["generate"], "give either PROMPT or --resume"),
        (
            ["generate", "--max-new-tokens", "many", "x"],
            "--max-new-tokens: generation.max_new_tokens must be",
        ),
        (["generate", "--bootstrap"], "requires an argument"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_code_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("p2pinfer: ")
    assert said.err.count("\n") == 1
    assert complaint in said.err


def test_with_json_an_error_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--json", "--config", "nowhere.toml"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["event"] == "error"
    assert "nowhere.toml" in told["error"]
    assert told["kind"] == "ConfigError"


def test_what_follows_two_dashes_is_no_switch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--config", "nowhere.toml", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("switches", [["-vv"], ["-v", "--verbose"], ["--verbose", "--verbose"]])
def test_very_verbose_shows_the_traceback(switches: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--config", "nowhere.toml", *switches]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_print_config_says_where_each_setting_comes_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.toml").write_text("[host]\nmax_connections = 7\n")
    monkeypatch.setenv("P2PINFER_MODEL", "some/model")
    argv = [name, *(["prompt"] if name == "generate" else []), "--config", "own.toml", "--print-config"]
    assert run([*argv, "--bootstrap", "/a", "--bootstrap", "/b", "--set", "host.dial_timeout_s=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'model = "some/model"  # $P2PINFER_MODEL' in lines
    assert 'bootstrap = ["/a", "/b"]  # --bootstrap' in lines
    assert "max_connections = 7  # own.toml" in lines
    assert "dial_timeout_s = 3.0  # --set" in lines


@pytest.mark.parametrize("argv", [["keygen"], ["reputation", "show"], ["reputation", "import"]])
def test_print_config_needs_none_of_a_commands_arguments(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*argv, "--set", "model=a", "--print-config"]) == 0
    assert 'model = "a"  # --set' in capsys.readouterr().out
    assert run(argv) == 2


def test_print_config_is_json_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--json", "--print-config", "--model", "a"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == {"value": "a", "origin": "--model"}
    assert said["bootstrap"] == {"value": [], "origin": "default"}


def test_a_flag_of_its_own_outweighs_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--set", "model=b", "--model", "a", "--print-config"]) == 0
    assert 'model = "a"  # --model' in capsys.readouterr().out


def test_help_comes_at_once() -> None:
    """In CPU time of a process of its own: the clock on the wall knows about other tests."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "p2pinfer", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.6


def test_neither_the_package_nor_the_command_line_imports_anything_heavy() -> None:
    script = "import sys, p2pinfer, p2pinfer.cli.app; print(*sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    imported = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment
    ).stdout.split()
    assert not {"torch", "transformers", "libp2p", "trio", "rich"} & set(imported)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["node", "--dtype", "int4"], "unknown dtype 'int4'; choose one of auto, float32, bfloat16, float16"),
        (["node", "--device", "tpu"], "unknown device 'tpu'; choose one of auto, cpu, cuda"),
        (["node", "--set", "compute.threads=-1"], "threads is -1"),
        (["node", "--blocks", "4"], "'4' is not a span"),
        (["generate", "--policy", "slowest", "x"], "'slowest' is no routing policy"),
        (["generate", "--policy", "fastet", "x"], "did you mean fastest?"),
        (["generate", "--set", "client.device=tpu", "x"], "unknown device 'tpu'"),
        (["generate", "--max-new-tokens", "0", "x"], "max_new_tokens is 0"),
        (["generate", "--resume", "p2pr1.AAAA"], "the resume token is cut short"),
        (["generate", "--swarm-key", "nowhere.key", "x"], "the swarm key nowhere.key cannot be read"),
        (
            ["generate", "--stop-id", "x", "x"],
            "--stop-id: generation.stop_ids must be a list of whole numbers",
        ),
        (["node", "--swarm-key", "nowhere.key"], "the swarm key nowhere.key cannot be read"),
    ],
)
def test_a_wrong_value_is_told_before_torch_is_imported(argv: list[str], complaint: str) -> None:
    script = "import sys; from p2pinfer.cli.app import run; print(run(sys.argv[1:]), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    ended = subprocess.run(
        [sys.executable, "-c", script, *argv], check=True, capture_output=True, text=True, env=environment
    )
    assert ended.stdout == "2 False\n"
    assert complaint in ended.stderr


def test_the_values_of_a_choice_stand_in_the_help() -> None:
    choosing = [option for _, option in setting_options() if option.choices]
    assert {option.setting for option in choosing} == {
        "client.policy",
        "client.prefill_codec",
        "client.speculate",
        "compute.dtype",
        "compute.device",
        "compute.weights",
        "tune.method",
        "weights.share",
    }
    for option in choosing:
        assert all(choice in (option.help or "") for choice in option.choices)


def test_a_process_that_fails_says_so_to_its_parent() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "p2pinfer", "node", "--config", "nowhere.toml"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "p2pinfer: the configuration file nowhere.toml does not exist\n"
