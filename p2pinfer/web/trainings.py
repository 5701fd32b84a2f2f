"""Trainings of this computer, as `p2pinfer tune` notes them in the data directory for a page to show.

A file for each training holds its losses, thinned. The page is served by another process, which may have
begun before or after it. A training whose process was killed leaves its file, and the reader sees that nobody
writes it any more.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec
import psutil
import trio

from p2pinfer.folders import write_private
from p2pinfer.node.concurrency.nurseries import open_nursery

logger = logging.getLogger(__name__)

FOLDER: Final = "trainings"
POINTS: Final = 300  # of a curve; a page is less wide
KEPT_S: Final = 86_400.0  # that a training which ended can be looked at
MOST: Final = 8  # that are shown, the latest first
EVERY_S: Final = 1.0  # between two writes
LAST_WRITE_S: Final = 5.0  # that a disk has to take the end of a training
_MOST_BYTES: Final = 1 << 16

State: TypeAlias = Literal["running", "done", "interrupted"]
Losses: TypeAlias = tuple[tuple[float, float], ...]  # step, and the mean loss around it


class TrainingDocument(msgspec.Struct, frozen=True):
    """A training as a page shows it."""

    name: str
    model: str
    state: State
    step: int
    steps: int
    loss: float | None  # of the last step; none before the first one
    tokens_per_s: float
    left_s: float
    losses: Losses


class _Note(msgspec.Struct, frozen=True):
    """A training, and the process that writes it: two processes of one number began at different times."""

    pid: int
    began: float
    training: TrainingDocument


class TrainingBoard:
    """The latest state of one training, for whoever writes it down."""

    def __init__(self, name: str, model: str) -> None:
        self._name, self._model = name, model
        self._step, self._steps, self._tokens_per_s, self._left_s = 0, 0, 0.0, 0.0
        self._losses: Sequence[float] = ()
        self.changed = trio.Event()

    def show(
        self, step: int, steps: int, losses: Sequence[float], tokens_per_s: float, left_s: float
    ) -> None:
        """Take what a step came to; this writes nothing, and returns at once."""
        self._step, self._steps, self._losses = step, steps, losses
        self._tokens_per_s, self._left_s = tokens_per_s, left_s
        self.changed.set()

    def document(self, *, is_over: bool = False) -> TrainingDocument:
        """The training as it stands."""
        ended: State = "done" if self._step and self._step == self._steps else "interrupted"
        return TrainingDocument(
            self._name,
            self._model,
            ended if is_over else "running",
            self._step,
            self._steps,
            self._losses[-1] if self._losses else None,
            self._tokens_per_s,
            self._left_s,
            thinned(self._losses),
        )


@asynccontextmanager
async def noted_training(data_dir: Path, name: str, model: str) -> AsyncGenerator[TrainingBoard]:
    """A board whose latest state is in the data directory, once a second while it changes.

    A disk that takes nothing costs the page its curve, and not the training.

    Args:
        name: For people: the folder that the adapter goes to.
    """
    path = data_dir / FOLDER / f"{secrets.token_hex(4)}.json"
    board = TrainingBoard(name, model)
    process = psutil.Process()

    def write(training: TrainingDocument) -> None:
        note = _Note(process.pid, process.create_time(), training)
        try:
            write_private(path, msgspec.json.encode(note))
        except OSError as exc:
            logger.warning("a page will not show this training: %s", exc)

    async def write_changes() -> None:
        while True:
            await board.changed.wait()
            board.changed = trio.Event()
            await trio.to_thread.run_sync(write, board.document())
            await trio.sleep(EVERY_S)

    await trio.to_thread.run_sync(_forget_old, path.parent, time.time())
    board.changed.set()
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(write_changes)
            yield board
            nursery.cancel_scope.cancel()
    finally:  # behind the last write of the task, which a cancellation does not interrupt
        with trio.move_on_after(LAST_WRITE_S, shield=True):
            await trio.to_thread.run_sync(write, board.document(is_over=True), abandon_on_cancel=True)


def read_trainings(
    data_dir: Path, is_alive: Callable[[int, float], bool] | None = None
) -> tuple[TrainingDocument, ...]:
    """Trainings that are noted there, the latest first.

    Args:
        is_alive: Tells by number and begin if a process runs still; by default the system's word.
    """
    is_alive = is_alive or _is_alive
    found: list[tuple[float, TrainingDocument]] = []
    for path in _files(data_dir / FOLDER):
        with suppress(OSError, msgspec.MsgspecError):
            status = path.stat()
            if status.st_size > _MOST_BYTES:
                continue
            note = msgspec.json.decode(path.read_bytes(), type=_Note)
            training = note.training
            if training.state == "running" and not is_alive(note.pid, note.began):
                training = msgspec.structs.replace(training, state="interrupted")
            found.append((status.st_mtime, training))
    found.sort(key=lambda each: each[0], reverse=True)
    return tuple(training for _, training in found[:MOST])


def thinned(losses: Sequence[float]) -> Losses:
    """A curve of at most `POINTS`, each the mean of as many steps; what is not finite is left out."""
    size = -(-len(losses) // POINTS) or 1
    made: list[tuple[float, float]] = []
    for at in range(0, len(losses), size):
        group = [loss for loss in losses[at : at + size] if abs(loss) < float("inf")]
        if group:
            made.append((at + (len(losses[at : at + size]) + 1) / 2, round(sum(group) / len(group), 6)))
    return tuple(made)


def _forget_old(folder: Path, now: float) -> None:
    for path in _files(folder):
        with suppress(OSError):
            if now - path.stat().st_mtime > KEPT_S:
                path.unlink()


def _files(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".json")]
    except OSError:  # nobody has trained here
        return []


def _is_alive(pid: int, began: float) -> bool:
    try:
        return bool(abs(psutil.Process(pid).create_time() - began) < 1)
    except (psutil.Error, ValueError, OverflowError):
        return False
