"""Command line: parses, dispatches, and turns every failure into one line and an exit code."""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click
from click.shell_completion import get_completion_class

from p2pinfer.cli.commands.chat import chat
from p2pinfer.cli.commands.doctor import doctor
from p2pinfer.cli.commands.generate import generate
from p2pinfer.cli.commands.keygen import keygen
from p2pinfer.cli.commands.man import man
from p2pinfer.cli.commands.node import node
from p2pinfer.cli.commands.plan import plan
from p2pinfer.cli.commands.reputation import reputation
from p2pinfer.cli.commands.serve import serve
from p2pinfer.cli.commands.swarm import swarm
from p2pinfer.cli.commands.tune import tune
from p2pinfer.cli.models.command import models
from p2pinfer.cli.output.plain import printable
from p2pinfer.cli.output.terminal import OutputClosed, note, occupy_streams, spare_no_text, write_out
from p2pinfer.errors import LocalError

from .failures import Failure, describe_failure
from .invocation import Invocation, command, help_option

PROGRAM = "p2pinfer"
_SHELLS = ("bash", "fish", "zsh")

# How long OpenMP's threads keep a core busy after their work, in turns of a loop. By default it is for
# milliseconds, which the event loop and everybody else on this machine wait for: a node of two threads served
# eight clients on two cores at 200 tokens/s, and at 220 with this. libgomp reads it once, as torch loads it.
_SPINS = "20000"


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a newcomer's questions, not of the alphabet

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        return help_option()


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version  # 30 ms that only this flag needs

        write_out(f"{PROGRAM} {version(PROGRAM)}\n")
        ctx.exit()


@click.group(
    PROGRAM,
    cls=_Group,
    invoke_without_command=True,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.pass_context
def app(ctx: click.Context) -> None:
    """Run large language models on a swarm of volunteers' computers.

    \b
    p2pinfer generate "Once upon a time"    generate text with the swarm in reach
    p2pinfer chat                           talk to a model
    p2pinfer tune --data FILE --out FOLDER  train an adapter over the swarm
    p2pinfer serve                          answer programs over HTTP, by OpenAI's and other APIs
    p2pinfer node                           serve blocks of a model to the swarm
    p2pinfer plan MODEL                     tell what a swarm for a model needs, and how fast it will be
    p2pinfer models                         list, fetch, check and remove models on this disk
    p2pinfer swarm                          list peers and the blocks they serve
    p2pinfer reputation                     list the trust scores of known peers
    """
    if ctx.invoked_subcommand is None:
        write_out(ctx.get_help() + "\n")


@command(
    "completion",
    examples=[
        'eval "$(p2pinfer completion bash)"          # in ~/.bashrc',
        'eval "$(p2pinfer completion zsh)"           # in ~/.zshrc',
        "p2pinfer completion fish | source           # in ~/.config/fish/config.fish",
    ],
)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(call: Invocation, shell: str) -> None:
    """Print the completion script for SHELL.

    It completes commands, options, files, settings, models and peers.
    """
    call.settings()
    completer = get_completion_class(shell)
    assert completer is not None, shell
    write_out(completer(app, {}, PROGRAM, "_P2PINFER_COMPLETE").source() + "\n")


app.add_command(generate)
app.add_command(chat)
app.add_command(tune)
app.add_command(serve)
app.add_command(node)
app.add_command(models)
app.add_command(swarm)
app.add_command(plan)
app.add_command(reputation)
app.add_command(doctor)
app.add_command(keygen)
app.add_command(completion)
app.add_command(man)


def run(argv: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code: 0; 1 for what went wrong, 2 for what was asked wrongly, 70 for a bug, 130 after Ctrl-C.
    """
    spare_no_text()
    try:
        returned = app.main(list(argv), prog_name=PROGRAM, standalone_mode=False)
    except BaseException as exc:
        if isinstance(exc, SystemExit):
            raise  # click's own, after printing a completion
        failure = describe_failure(exc)
        _tell(failure, exc, argv)
        return failure.exit_code
    return returned if isinstance(returned, int) else 0


def _tell(failure: Failure, error: BaseException, argv: Sequence[str]) -> None:
    if not failure.message:
        return
    own = argv[: argv.index("--")] if "--" in argv else argv
    if _verbosity(own) >= 2:
        lines = "".join(traceback.format_exception(error)).rstrip().split("\n")
        note("\n".join(printable(line) for line in lines))
    note(f"{PROGRAM}: {failure.message}")
    if "--json" in own:
        with suppress(OutputClosed, LocalError):
            write_out(json.dumps(failure.to_dict()) + "\n")


def _verbosity(argv: Sequence[str]) -> int:
    """Number of times -v was given, for failures from before the options were read."""
    short = sum(word.count("v") for word in argv if word.startswith("-v") and word.strip("-v") == "")
    return short + sum(word == "--verbose" for word in argv)


def main() -> None:
    """The `p2pinfer` command."""
    occupy_streams()
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    leave(run(sys.argv[1:]))


def leave(exit_code: int) -> NoReturn:
    """End the process without the interpreter's own cleaning up: with torch loaded that takes a second."""
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] - it has no public name
    for stream in (sys.stdout, sys.stderr):  # pragma: no cover - coverage has just stopped counting
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or it was closed
            stream.flush()
    os._exit(exit_code)  # pragma: no cover
