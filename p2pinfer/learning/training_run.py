"""Run of a training from examples to files, with checkpoints from which it goes on as if never interrupted.

The order of the examples is a function of the seed and the epoch, and sums are in a fixed order. So a
training that was killed and resumed makes the same steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from p2pinfer.client_config import TuneConfig
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.learning.tensor_files import write_file

from .checkpoint_file import Checkpoint, Fingerprint, check_same, read_checkpoint, write_checkpoint
from .examples import Example
from .loss_picture import loss_picture
from .peft_files import ensure_folder
from .tuner import Tuner

PICTURE_FILE: Final = "loss.svg"


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a run after a step.

    Attributes:
        step: Steps that are done, those before a resumption included.
        steps: Steps in all.
        loss: Of the last step.
        tokens_per_s: Tokens of texts, since this run began.
        left_s: How long the rest will take at this rate.
    """

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    left_s: float


def fingerprint_of(spec: ModelSpec, digest: str, config: TuneConfig) -> Fingerprint:
    """Settings that stay as they are over a training."""
    return Fingerprint(
        spec.model,
        spec.revision,
        digest,
        config.method,
        config.rank,
        config.alpha,
        config.targets,
        config.prompt_tokens,
        config.batch_rows,
        config.max_tokens,
        config.seed,
    )


def total_steps(examples: int, config: TuneConfig) -> int:
    """Steps of a whole training."""
    return config.epochs * -(-examples // config.batch_rows)


def batch_of(examples: Sequence[Example], step: int, config: TuneConfig) -> list[Example]:
    """Examples of a step; every epoch has an order of its own."""
    per_epoch = -(-len(examples) // config.batch_rows)
    epoch, index = divmod(step, per_epoch)
    order = list(range(len(examples)))
    random.Random(f"{config.seed}:{epoch}").shuffle(order)
    chosen = order[index * config.batch_rows : (index + 1) * config.batch_rows]
    return [examples[each] for each in chosen]


class TrainingRun:
    """One training in one folder.

    Attributes:
        losses: One for each step so far.
        written: Steps that the folder's checkpoint holds.
    """

    def __init__(
        self,
        tuner: Tuner,
        examples: Sequence[Example],
        config: TuneConfig,
        fingerprint: Fingerprint,
        folder: Path,
    ) -> None:
        self.losses: list[float] = []
        self.written = 0
        self._tuner = tuner
        self._examples = examples
        self._config = config
        self._fingerprint = fingerprint
        self._folder = folder
        self._steps = total_steps(len(examples), config)

    async def resume(self) -> None:
        """Go on from the folder's checkpoint, if it has one.

        Raises:
            ConfigError: It is damaged, or of a training with other settings.
        """
        kept = await trio.to_thread.run_sync(read_checkpoint, self._folder)
        if kept is not None:
            check_same(kept.fingerprint, self._fingerprint)
            self._tuner.load_state(kept.tensors)
            self.losses = list(kept.losses)
            self.written = len(self.losses)

    async def run(self, on_step: Callable[[Progress], None] = lambda progress: None) -> None:
        """Make the steps that are left, then write adapter, checkpoint and picture.

        Cancelled, it keeps a checkpoint of the steps that are done.

        Raises:
            P2PInferError: A step failed; a checkpoint of those before it is kept.
        """
        await trio.to_thread.run_sync(ensure_folder, self._folder)
        if not self.losses:
            await self._write()
        begun, tokens, before = time.monotonic(), 0, len(self.losses)
        try:
            while (step := len(self.losses)) < self._steps:
                batch = batch_of(self._examples, step, self._config)
                self._tuner.forward_backward(batch)
                result = await self._tuner.optim_step(self._config.rate(step))
                self.losses.append(result.loss)
                tokens += sum(len(each.token_ids) for each in batch)
                passed = time.monotonic() - begun
                done = len(self.losses)
                left_s = passed / (done - before) * (self._steps - done)
                on_step(Progress(done, self._steps, result.loss, tokens / passed, left_s))
                if not done % self._config.checkpoint_steps:
                    await self._write()
        finally:
            with trio.CancelScope(shield=True):
                if len(self.losses) > self.written:
                    await self._write()
        await self._tuner.save(self._folder)
        await trio.to_thread.run_sync(self._draw)

    async def _write(self) -> None:
        losses = tuple(self.losses)
        checkpoint = Checkpoint(self._fingerprint, losses, self._tuner.state())
        await trio.to_thread.run_sync(write_checkpoint, self._folder, checkpoint)
        self.written = len(losses)
        if losses:
            await trio.to_thread.run_sync(self._draw)

    def _draw(self) -> None:
        title = f"Loss of {self._fingerprint.method} on {self._fingerprint.model}"
        write_file(self._folder / PICTURE_FILE, loss_picture(self.losses, title).encode())
