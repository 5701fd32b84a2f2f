"""`p2pinfer tune`: an adapter trained over the swarm from a file of examples."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pinfer.cli.invocation import (
    ALLOW,
    BOOTSTRAP,
    DATA_DIR,
    DENY,
    IDENTITY,
    MODEL,
    SWARM_KEY,
    Invocation,
    command,
    setting,
)
from p2pinfer.cli.output.terminal import note, write_out
from p2pinfer.cli.output.waiting import WaitingLine
from p2pinfer.errors import ConfigError

if TYPE_CHECKING:
    from p2pinfer.client import Client
    from p2pinfer.client_config import TuneConfig
    from p2pinfer.learning.examples import DataFile, Prepared
    from p2pinfer.learning.training_run import Progress, TrainingRun
    from p2pinfer.web.trainings import TrainingBoard

_METHODS = ("lora", "prompt")
_LINES = 10  # of progress, where standard error is no terminal


@command(
    "tune",
    examples=[
        "p2pinfer tune --data stories.jsonl --out my-adapter",
        "p2pinfer tune --data stories.jsonl --out my-adapter --rank 16 --epochs 3 --learning-rate 1e-3",
        "p2pinfer tune --data stories.jsonl --out my-prompt --method prompt --prompt-tokens 20",
        "p2pinfer tune --data stories.jsonl --out my-adapter --resume",
        'echo \'{"prompt": "Tom has a cat.", "completion": " It is red."}\' >> stories.jsonl',
    ],
)
@MODEL
@click.option(
    "--data",
    "data_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Examples, one JSON object a line: text, or prompt and completion, or messages.",
)
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the adapter, in peft's files, of checkpoints and of loss.svg.",
)
@click.option("--resume", is_flag=True, help="Continue the training that was interrupted in --out.")
@setting(
    "tune.method",
    "--method METHOD",
    "What is trained: lora, or prompt: virtual tokens before every text. [default: lora]",
    choices=_METHODS,
)
@setting("tune.rank", "--rank R", "Rank of LoRA. [default: 8]")
@setting("tune.alpha", "--alpha A", "Scale of LoRA, divided by the rank. [default: 16.0]")
@setting("tune.prompt_tokens", "--prompt-tokens N", "Virtual tokens of --method prompt. [default: 16]")
@setting(
    "tune.learning_rate",
    "--learning-rate X",
    "Learning rate of AdamW. [default: 5e-4 for lora, 1e-2 for prompt]",
)
@setting("tune.batch_rows", "--batch N", "Texts of one step. [default: 8]")
@setting("tune.epochs", "--epochs N", "Times that every text is used. [default: 1]")
@setting("tune.max_tokens", "--max-tokens N", "Cut longer texts. [default: 512]")
@setting("tune.seed", "--seed S", "Seed of the first values and of the order of the texts. [default: 0]")
@setting("tune.checkpoint_steps", "--checkpoint-every N", "Steps between two checkpoints. [default: 20]")
@BOOTSTRAP
@SWARM_KEY
@ALLOW
@DENY
@IDENTITY
@DATA_DIR
def tune(call: Invocation, data_file: Path | None, folder: Path | None, resume: bool) -> None:
    """Train an adapter over the swarm.

    The model's blocks stay on the nodes, and do not change. What is trained is yours, and stays here.

    A line of FILE is {"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [...]}. Of the
    last two, the completion and the last message are learnt.

    FOLDER gets the adapter in peft's files, which transformers and peft load. A training that was
    interrupted, also by kill -9 or a power failure, continues with --resume from its last checkpoint, and
    makes the same steps.

    Nodes see the hidden states of your texts. If no swarm in reach serves the model, three temporary nodes on
    this computer run it, as for generate.
    """
    from p2pinfer.client_config import ClientConfig, SessionConfig, TuneConfig
    from p2pinfer.config import SharedConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.routing.config import RoutingConfig

    settings = call.settings(TuneConfig, ClientConfig, SessionConfig, RoutingConfig, HostConfig)
    if data_file is None or folder is None:
        raise click.UsageError("give --data FILE and --out FOLDER")
    shared, config = settings.build(SharedConfig), settings.build(TuneConfig)
    client_config, host_config = settings.build(ClientConfig), settings.build(HostConfig)
    session_config, routing_config = settings.build(SessionConfig), settings.build(RoutingConfig)
    _check_folder(folder, resume=resume)
    waiting = click.get_current_context().with_resource(WaitingLine(quiet=not call.is_for_people))
    waiting.say("loading torch and libp2p", at_once="torch" not in sys.modules)
    from p2pinfer.cli.output.progress import Bars, NodesStarting
    from p2pinfer.cli.running import run
    from p2pinfer.client import Client
    from p2pinfer.embedded import client_host_config, may_embed, swarm_in_reach
    from p2pinfer.learning.examples import read_data
    from p2pinfer.web.trainings import noted_training

    data = read_data(data_file)  # before anything is joined: what is wrong with it is told at once

    async def main() -> None:
        embedding = may_embed(shared.model, shared.bootstrap, host_config)
        client = Client(
            **settings.shared(),
            config=client_config,
            host_config=client_host_config(host_config, embedding=embedding),
            session_config=session_config,
            routing_config=routing_config,
            progress=Bars(quiet=call.quiet, waiting=waiting),
        )
        waiting.say(f"opening {shared.model}")
        with NodesStarting(quiet=call.quiet, waiting=waiting) as starting:
            async with client:
                prepared = await _prepare(client, data, config, waiting, call)
                waiting.say("looking for peers")
                async with (
                    swarm_in_reach(client, embedding=embedding, on_embedding=starting),
                    noted_training(shared.data_dir, folder.name, client.spec.model) as board,
                ):
                    await _train(client, prepared, data, config, folder, waiting, call, board)

    run(main)


def _check_folder(folder: Path, *, resume: bool) -> None:
    """Nothing, if a training may be written there.

    Raises:
        ConfigError: It holds another one, which is not to be resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    if not resume:
        for name in ("checkpoint.safetensors", "adapter_model.safetensors", "adapter_config.json"):
            if (folder / name).exists():
                raise ConfigError(
                    f"--out {folder} holds a training already ({name}); --resume continues it, or name "
                    "another folder"
                )


async def _prepare(
    client: Client, data: DataFile, config: TuneConfig, waiting: WaitingLine, call: Invocation
) -> Prepared:
    import trio

    from p2pinfer.learning.examples import prepare

    parts, done = client.local, 0

    def count(examples: int) -> None:
        nonlocal done
        done = examples

    waiting.say(lambda: f"reading example {done + 1:,} of {len(data.lines):,}")
    prepared = await trio.to_thread.run_sync(
        prepare, data, parts.tokenizer, client.chat_template, config.max_tokens, count, abandon_on_cancel=True
    )
    if call.is_for_people:
        if prepared.cut:
            note(f"{prepared.cut} examples are cut to {config.max_tokens} tokens (--max-tokens)")
        if prepared.empty:
            note(f"{prepared.empty} examples have nothing to predict, and are left out")
    return prepared


async def _train(
    client: Client,
    prepared: Prepared,
    data: DataFile,
    config: TuneConfig,
    folder: Path,
    waiting: WaitingLine,
    call: Invocation,
    board: TrainingBoard,
) -> None:
    from p2pinfer.learning.training_run import TrainingRun, fingerprint_of

    async with client.tuner(config) as tuner:
        fingerprint = fingerprint_of(client.spec, data.digest, config)
        run = TrainingRun(tuner, prepared.examples, config, fingerprint, folder)
        await run.resume()
        before = len(run.losses)
        if before and call.is_for_people:
            note(f"continuing after step {before}")
        waiting.say("waiting for the first step")
        told = _Teller(waiting, call)

        def step(progress: Progress) -> None:
            told.step(progress)
            board.show(progress.step, progress.steps, run.losses, progress.tokens_per_s, progress.left_s)

        try:
            await run.run(step)
        except BaseException:
            waiting.pause()
            if run.written and call.is_for_people:
                note(f"interrupted after step {run.written}; to continue: {_command_to_resume()}")
            raise
        waiting.pause()
        _tell_end(run, told.last, tuner.hops, folder, call)


class _Teller:
    """Shows the steps: one line that changes on a terminal, a few lines elsewhere."""

    def __init__(self, waiting: WaitingLine, call: Invocation) -> None:
        self.last: Progress | None = None
        self._waiting = waiting
        self._is_told = call.is_for_people
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()

    def step(self, progress: Progress) -> None:
        self.last = progress
        if self._on_terminal:
            self._waiting.say(_line(progress))
            return
        self._waiting.pause()
        each = -(-progress.steps // _LINES)
        if self._is_told and not progress.step % each:
            note(_line(progress))


def _line(progress: Progress) -> str:
    left = progress.left_s
    return (
        f"step {progress.step:,} of {progress.steps:,}: loss {progress.loss:.4f}, "
        f"{progress.tokens_per_s:,.0f} tokens/s, {_duration(left)} left"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def _tell_end(
    run: TrainingRun, last: Progress | None, hops: tuple[str, ...], folder: Path, call: Invocation
) -> None:
    first, ended = run.losses[0], run.losses[-1]
    if call.json:
        import json

        told = {
            "folder": str(folder),
            "steps": len(run.losses),
            "losses": run.losses,
            "tokens_per_s": None if last is None else last.tokens_per_s,
            "hops": list(hops),
        }
        write_out(json.dumps(told) + "\n")
    elif not call.quiet:
        speed = "" if last is None else f", {last.tokens_per_s:,.0f} tokens/s"
        write_out(
            f"{len(run.losses):,} steps, loss {first:.4f} to {ended:.4f}{speed}; "
            f"the adapter and loss.svg are in {folder}\n"
        )


def _command_to_resume() -> str:
    """The command as it was given, and --resume."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["p2pinfer", *words, "--resume"])
