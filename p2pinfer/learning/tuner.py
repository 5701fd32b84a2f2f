"""Tuner: an adapter, its optimiser, and the four verbs: forward_backward, optim_step, sample, save.

`forward_backward` begins at once and is awaited when its result is wanted, so that the next batch is under
way while the last one returns. Gradients of all of them are added up, in the order of the calls and not in
that of the answers, so that the same calls give the same numbers. `optim_step` divides by what was predicted:
a step over two halves of a batch is the step over the batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import trio
from torch import Tensor

from p2pinfer.errors import ConfigError, LocalError
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.learning.ends import IGNORED, Loss, TrainedEnds, cross_entropy
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.text.sampling import Sampler, SamplingConfig
from p2pinfer.models.text.text import Tokenizer

from .examples import Example, make_example
from .peft_files import ensure_folder, save_adapter
from .swarm_trainer import MICROBATCH_TOKENS, Batch, SwarmTrainer
from .trained_adapter import ModelAdapter
from .tuned_adapter import TunedAdapter

IN_FLIGHT: Final = 8  # microbatches under way; each holds its logits' gradient and every hop's input


@dataclass(frozen=True, slots=True)
class PassResult:
    """Result of a `forward_backward`.

    Attributes:
        loss: Mean over the tokens that were predicted.
        predicted: Number of them.
        tokens: Number of all tokens.
    """

    loss: float
    predicted: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of an `optim_step`.

    Attributes:
        loss: Mean over all tokens that were predicted since the last step.
        gradient_norm: Of the mean's gradient, before it was clipped.
    """

    loss: float
    predicted: int
    gradient_norm: float


class Pending:
    """A `forward_backward` that is under way; awaiting it gives its `PassResult`."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: PassResult | None = None
        self.gradients: list[Tensor] = []
        self.error: Exception | None = None

    def __await__(self) -> Generator[Any, Any, PassResult]:
        yield from self.done.wait().__await__()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


class Tuner:
    """Trains one adapter; one task uses it. Made by `tuner_over`.

    Attributes:
        adapter: Its values.
        tokenizer: Of the model.
    """

    def __init__(
        self,
        trainer: SwarmTrainer,
        ends: EmbeddingAndHead,
        tokenizer: Tokenizer,
        adapter: TunedAdapter,
        optimizer: torch.optim.Optimizer,
        nursery: trio.Nursery,
        max_gradient_norm: float,
    ) -> None:
        self.adapter = adapter
        self.tokenizer = tokenizer
        self._trainer = trainer
        self._ends = TrainedEnds(ends)
        self._spec = ends.spec
        self._architecture = ends.architecture
        self._optimizer = optimizer
        self._nursery = nursery
        self._max_gradient_norm = max_gradient_norm
        self._pending: list[Pending] = []
        self._room = trio.CapacityLimiter(IN_FLIGHT)
        self._head = trio.CapacityLimiter(1)  # its products use all cores

    @property
    def hops(self) -> tuple[str, ...]:
        """Peers that compute at the moment; none before the first pass."""
        return self._trainer.route.peer_ids

    def example(self, prompt: str, completion: str) -> Example:
        """An example whose completion is learnt; with an empty prompt, all of it but the first token."""
        line = {"prompt": prompt, "completion": completion} if prompt else {"text": completion}
        return make_example(line, self.tokenizer, None)

    # ------------------------------------------------------------------ the four verbs

    def forward_backward(self, examples: Sequence[Example], loss: Loss = cross_entropy) -> Pending:
        """Begin to run a batch there and back, and to add its gradient to those of the next step.

        Args:
            loss: A function of logits, (n, vocab_size) float32, and labels, (n,), that gives their sum.

        Raises:
            ConfigError: Nothing of the batch is to be predicted.
        """
        if not sum(each.targets for each in examples):
            raise ConfigError("a batch without a token to predict")
        pending = Pending()
        self._pending.append(pending)
        self._nursery.start_soon(self._run, pending, tuple(examples), loss, self.adapter.snapshot())
        return pending

    async def optim_step(self, learning_rate: float | None = None) -> StepResult:
        """Wait for what was begun, and change the adapter by its gradient.

        Raises:
            P2PInferError: A batch failed. None of the gradients is applied, and all are forgotten.
            LocalError: There was no batch, or a gradient is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            raise LocalError("a step without a batch: call forward_backward before optim_step")
        results = [await each for each in pending]
        predicted = sum(each.predicted for each in results)
        total = self.adapter.zeros()
        for each in pending:
            for into, part in zip(total, each.gradients, strict=True):
                into += part
        norm = await trio.to_thread.run_sync(self._apply, total, predicted, learning_rate)
        self.adapter.changed()
        loss = sum(each.loss * each.predicted for each in results) / predicted
        return StepResult(loss, predicted, norm)

    async def sample(
        self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int | None = None
    ) -> str:
        """Text that the model continues `prompt` with, by the adapter as it is.

        It computes the whole text for every token, so it is for a look at what was learnt.
        """
        sampler = Sampler(SamplingConfig(temperature=temperature, seed=seed))
        ids = self.tokenizer.encode(prompt)
        begin = len(ids)
        adapter = self.adapter.snapshot()
        for _ in range(max_new_tokens):
            batch = await trio.to_thread.run_sync(self._batch, [ids])
            trace = await self._trainer.forward(batch, adapter, keeps=False)
            logits = await trio.to_thread.run_sync(self._ends.last_logits, trace.output)
            chosen = sampler.pick(logits, len(ids))
            if chosen in self.tokenizer.eos_ids:
                break
            ids.append(chosen)
        return self.tokenizer.decode(ids)[len(self.tokenizer.decode(ids[:begin])) :]

    async def save(self, folder: str | Path) -> None:
        """Write the adapter in peft's files, which transformers + peft, vLLM and `generate` load.

        Raises:
            LocalError: They cannot be written.
        """
        path = Path(folder)

        def write() -> None:
            ensure_folder(path)
            save_adapter(self.adapter, self._spec, self._architecture, path)

        await trio.to_thread.run_sync(write)

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Tensor]:
        """Values of the adapter and of its optimiser; copies."""
        found: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.adapter.parameters()):
            found[f"parameter.{index}"] = parameter.detach().clone()
            for name, value in self._optimizer.state[parameter].items():
                found[f"optimizer.{index}.{name}"] = value.detach().clone()
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            ConfigError: It is of another adapter.
        """
        parameters = self.adapter.parameters()
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                value = state.get(f"parameter.{index}")
                if value is None or value.shape != parameter.shape or f"parameter.{len(parameters)}" in state:
                    raise ConfigError("a checkpoint of another adapter")
                parameter.copy_(value)
                start = f"optimizer.{index}."
                kept = {
                    name.removeprefix(start): value for name, value in state.items() if name.startswith(start)
                }
                if kept:
                    self._optimizer.state[parameter] = {name: value.clone() for name, value in kept.items()}
        self.adapter.changed()

    # ------------------------------------------------------------------ passes

    async def _run(
        self, pending: Pending, examples: tuple[Example, ...], loss: Loss, adapter: ModelAdapter | None
    ) -> None:
        parts = _microbatches(examples, self.adapter.prompt_tokens)
        found: list[tuple[float, list[Tensor]] | None] = [None] * len(parts)

        async def one(index: int) -> None:
            async with self._room:
                found[index] = await self._pass(parts[index], loss, adapter)

        try:
            async with trio.open_nursery() as nursery:
                for index in range(len(parts)):
                    nursery.start_soon(one, index)
        except ExceptionGroup as group:  # raised where the result is awaited
            pending.error = _first_error(group)
        else:
            _finish(pending, examples, [each for each in found if each is not None])
        finally:
            pending.done.set()

    async def _pass(
        self, examples: Sequence[Example], loss: Loss, adapter: ModelAdapter | None
    ) -> tuple[float, list[Tensor]]:
        """The loss of a microbatch, and its gradient in the order of the parameters."""
        batch = await trio.to_thread.run_sync(self._batch, [each.token_ids for each in examples])
        virtual = self.adapter.prompt_tokens
        before = [IGNORED] * virtual  # the first token of a text is given, and follows from the last of these
        labels = torch.tensor([label for each in examples for label in (*before, *each.labels)])
        trace = await self._trainer.forward(batch, adapter)
        value, gradient = await trio.to_thread.run_sync(
            self._ends.loss, trace.output, labels, loss, limiter=self._head
        )
        hidden, of_adapter = await self._trainer.backward(trace, gradient, wants_hidden=virtual > 0)
        total = self.adapter.zeros()
        of_prompt: Tensor | None = None
        if virtual:
            assert hidden is not None
            of_prompt = torch.zeros_like(total[0])
            at = 0
            for length in batch.rows.lengths:
                of_prompt += hidden[at : at + virtual]
                at += length
        self.adapter.add(total, of_adapter, of_prompt)
        return value, total

    def _batch(self, texts: Sequence[Sequence[int]]) -> Batch:
        """Hidden states of texts, the prompt before each of them."""
        prompt = self.adapter.prompt
        parts: list[Tensor] = []
        lengths: list[int] = []
        for ids in texts:
            embedded = self._ends.embed(ids).float()
            if prompt is not None:
                embedded = torch.cat((prompt.detach(), embedded))
            parts.append(embedded)
            lengths.append(len(embedded))
        order = torch.cat([torch.arange(length) for length in lengths])
        return Batch(Rows(lengths, order, order), torch.cat(parts))

    def _apply(self, total: list[Tensor], predicted: int, learning_rate: float | None) -> float:
        parameters = self.adapter.parameters()
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient / predicted
        limit = self._max_gradient_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if norm != norm or norm == float("inf"):
            raise LocalError("a gradient that is not finite: the training has diverged")
        if learning_rate is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm


def _microbatches(examples: Sequence[Example], virtual: int) -> list[list[Example]]:
    """Examples in groups of at most `MICROBATCH_TOKENS`; a longer one is alone."""
    parts: list[list[Example]] = []
    size = 0
    for each in examples:
        tokens = len(each.token_ids) + virtual
        if not parts or size + tokens > MICROBATCH_TOKENS:
            parts.append([])
            size = 0
        parts[-1].append(each)
        size += tokens
    return parts


def _finish(
    pending: Pending, examples: Sequence[Example], found: Sequence[tuple[float, list[Tensor]]]
) -> None:
    total = [torch.zeros_like(each) for each in found[0][1]]
    for _, gradients in found:
        for into, part in zip(total, gradients, strict=True):
            into += part
    predicted = sum(each.targets for each in examples)
    pending.gradients = total
    pending.result = PassResult(
        sum(value for value, _ in found) / predicted,
        predicted,
        sum(len(each.token_ids) for each in examples),
    )


def _first_error(group: BaseExceptionGroup[Exception]) -> Exception:
    """The first failure of a group; the others were cancelled, or failed for the same reason."""
    first: Exception | BaseExceptionGroup[Exception] = group.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first
