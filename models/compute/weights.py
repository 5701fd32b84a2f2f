"""Tensors of a checkpoint on their way into layers: checked, joined, converted and placed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.progress import Progress
from p2pinfer.models.quantised.formats import Packed, blank, quantise, quantise_into

from .layers import AnyLinear, LayerNorm, Norm, RmsNorm
from .target import Target


class Weights:
    """The tensors of a checkpoint whose names begin with `prefix`, each to be taken once.

    What a checkpoint gives is ours, so a tensor that is as it should be is not copied again.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        names: frozenset[str],
        target: Target,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._left = set(names)
        self._target = target
        self._progress = progress

    def has(self, name: str) -> bool:
        """True if there is such a tensor, taken or not."""
        return self._prefix + name in self._checkpoint.names()

    def linear(
        self,
        names: Sequence[str],
        inputs: int,
        outputs: Sequence[int],
        *,
        bias: bool = False,
        order: Tensor | None = None,
        whole: bool = False,
    ) -> AnyLinear:
        """Several products of the same rows as one, their outputs side by side.

        Args:
            names: Of the products.
            inputs: What a row has.
            outputs: What a row gets from each product.
            bias: Whether they have biases. Where none of them is stored they are zero, as in transformers.
            order: Which stored output each output is, where that is another.
            whole: Keep the weight as it is where others are quantised: rounding would change choices.
        """
        sizes = list(zip(names, outputs, strict=True))
        weight: Tensor | Packed
        # Placed before they are joined: of what is stored in more bits, only one is held in those.
        if self._target.format is None or whole:
            weight = _joined([self.table(name, size, inputs) for name, size in sizes])
            weight = weight if order is None else weight[order]
        else:
            weight, stop = blank(sum(outputs), inputs, self._target.format, self._target.device), 0
            for name, size in sizes:
                start, stop = stop, stop + size
                # No name for what is read: it would be kept until the next one has been.
                part = weight.rows(slice(start, stop))
                quantise_into(part, self._take(f"{name}.weight", size, inputs).to(self._target.device))
            weight = weight if order is None else weight.rows(order.to(self._target.device))
        if not (bias and any(self.has(f"{name}.bias") for name in names)):
            return self._target.linear(weight)
        biases = _joined([self._target.place(self._take(f"{name}.bias", size)) for name, size in sizes])
        return self._target.linear(weight, biases if order is None else biases[order])

    def stored(self, name: str, *shape: int) -> Tensor:
        """A tensor as it is stored, of this shape."""
        return self._take(name, *shape)

    def placed(self, weight: Tensor, bias: Tensor | None = None) -> AnyLinear:
        """A product of tensors that were taken with `stored`."""
        held = self._target.place(weight) if self._target.format is None else self._packed(weight)
        return self._target.linear(held, None if bias is None else self._target.place(bias))

    def scores(self, name: str, count: int) -> Tensor:
        """A vector in float32, as attention takes what joins its scores."""
        return self._take(name, count).to(self._target.device, self._target.dtype).float()

    def norm(self, name: str, *shape: int, eps: float, offset: float = 0.0) -> Norm:
        """A root mean square norm.

        A weight that is stored less an `offset` becomes float32: 1 + w needs the bits.
        """
        weight = self._take(f"{name}.weight", *shape)
        if offset:
            return RmsNorm((weight.float() + offset).to(self._target.device), eps)
        return RmsNorm(self._target.place(weight), eps)

    def layer_norm(self, name: str, *shape: int, eps: float, bias: bool) -> Norm:
        """A norm of mean and variance."""
        weight = self._target.place(self._take(f"{name}.weight", *shape))
        return LayerNorm(
            weight, eps, self._target.place(self._take(f"{name}.bias", *shape)) if bias else None
        )

    def table(self, name: str, rows: int, columns: int) -> Tensor:
        """A plain matrix."""
        return self._target.place(self._take(f"{name}.weight", rows, columns))

    def finish(self) -> None:
        """Nothing, if every tensor was taken.

        Raises:
            CheckpointError: Some were not, so what they are for would not be computed.
        """
        if self._left:
            raise CheckpointError(
                f"{self._checkpoint.spec.model} has the tensor {min(self._left)}, which a model of family "
                f"{self._checkpoint.spec.family!r} with this config does not use"
            )

    def _packed(self, weight: Tensor) -> Packed:
        """The weight, quantised where it will be."""
        assert self._target.format is not None
        return quantise(weight.to(self._target.device), self._target.format)

    def _take(self, name: str, *shape: int) -> Tensor:
        stored = self._checkpoint.read(self._prefix + name)
        if stored.shape != shape:
            raise CheckpointError(
                f"{self._prefix}{name} of {self._checkpoint.spec.model} has the shape {tuple(stored.shape)}; "
                f"its config implies {shape}"
            )
        self._left.discard(self._prefix + name)
        self._progress.advance(self._checkpoint.bytes_of([self._prefix + name]))
        return stored


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
