"""Layers of a model whose weights are elsewhere: names and shapes for peft, and the way to the swarm.

Each block is a module with named products that have no weights. peft wraps those that a config asks for, and
its A and B are parameters here. A forward pass looks for them and sends them along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from p2pinfer.errors import LocalError
from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.learning.adapter import PREFIX, PROJECTIONS, LowRank, projection_shape
from p2pinfer.models.span import BlockSpan

from .remote_pass import Positions, RemotePasses
from .swarm_cache import SwarmCache

# Keys and values of each block before those of every sequence: (kv_heads, tokens, head_dim) each.
Prefix: TypeAlias = Sequence[tuple[Tensor, Tensor]]


class RemoteLinear(nn.Linear):
    """A product of a block on the swarm: its shape, and no weight."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Nothing: blocks run as a whole, where their weights are.

        Raises:
            LocalError: Always.
        """
        raise LocalError("this product runs on the swarm, as a part of its block: call the model's layers")


class RemoteLayer(nn.Module):
    """One block on the swarm, with the products that an adapter may change."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        for name in PROJECTIONS:
            try:
                inputs, outputs = projection_shape(architecture, name)
            except ValueError:  # a mixture of experts has no such products
                continue
            part, _, product = name.partition(".")
            if not hasattr(self, part):
                self.add_module(part, nn.Module())
            self.get_submodule(part).add_module(product, RemoteLinear(inputs, outputs, dtype))

    def forward(self, *_: object, **__: object) -> Tensor:
        """Nothing by itself: see `RemoteLayers`.

        Raises:
            LocalError: Always.
        """
        raise LocalError("a layer of a distributed model is called as layers[i : i + 1](hidden)")


class RemoteLayers(nn.ModuleList):
    """Blocks on the swarm; a slice of them is callable, and differentiable.

    Attributes:
        span: Which of the model's blocks these are.
        deep_prompts: (num_blocks of the model, tokens, hidden_size), added to the first hidden states of
            every sequence before each block; None unless `add_deep_prompts` was called.
    """

    deep_prompts: nn.Parameter | None

    def __init__(self, layers: list[RemoteLayer], passes: RemotePasses, span: BlockSpan) -> None:
        super().__init__(layers)
        self.passes = passes
        self.span = span
        self.register_parameter("deep_prompts", None)

    def add_deep_prompts(self, tokens: int, std: float = 0.02) -> nn.Parameter:
        """Give every block a trainable prompt of so many tokens, drawn with a standard deviation."""
        prompts = torch.randn(len(self), tokens, self.passes.spec.hidden_size) * std
        self.deep_prompts = nn.Parameter(prompts)
        return self.deep_prompts

    def __getitem__(self, idx: Any) -> Any:
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        start, stop, step = idx.indices(len(self))
        if step != 1 or start >= stop:
            raise LocalError(
                f"layers[{start}:{stop}:{step}]: blocks follow each other, and there is at least one"
            )
        part = RemoteLayers.__new__(RemoteLayers)
        nn.Module.__init__(part)
        for index, layer in enumerate(list(self)[start:stop]):
            part.add_module(str(index), layer)
        part.passes = self.passes
        part.span = BlockSpan(self.span.start + start, self.span.start + stop)
        part.register_parameter("deep_prompts", self.deep_prompts)
        return part

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prefix: Prefix = (),
    ) -> Tensor:
        """Hidden states after the blocks.

        Args:
            hidden: (batch, seq, hidden_size).
            attention_mask: (batch, seq), 0 for padding, whose outputs are zeros; None: there is none.
                With a prefix, (batch, prefix tokens + seq).
            position_ids: (batch, seq) or (1, seq); 0, 1, 2, ... by default, or those behind the prefix.
            prefix: Of every block here; differentiable, as all else is.

        Raises:
            LocalError: An adapter is of a kind that does not run on the swarm, or the mask of another shape.
            NoRoute: Nobody serves some of the blocks.
        """
        before = prefix[0][0].shape[1] if prefix else 0
        positions = Positions.of(hidden, attention_mask, position_ids, before)
        found: list[tuple[LowRank, tuple[Tensor, Tensor]]] = list(self._updates())
        for block, (keys, values) in enumerate(prefix, self.span.start):
            wide = (keys.transpose(0, 1).flatten(1), values.transpose(1, 2).flatten(0, 1))
            found.append((LowRank(block, PREFIX, before, 1.0), wide))
        packed = positions.pack(hidden)
        output = self.passes.run(
            packed,
            positions.rows,
            self.span,
            [update for update, _ in found],
            [each for _, factors in found for each in factors],
            self.deep_prompts,
        )
        return positions.unpack(output)

    def go_on(self, hidden: Tensor, attention_mask: Tensor | None, cache: SwarmCache) -> Tensor:
        """Hidden states after the blocks, of tokens that follow those of `cache`; not differentiable.

        Args:
            hidden: (batch, new, hidden_size), whose positions are those after what is there of each row.
            attention_mask: (batch, all so far), as for `forward`.
        """
        whole, new = cache.extend(hidden), hidden.shape[1]
        if attention_mask is not None and attention_mask.shape != whole.shape[:2]:
            raise LocalError(
                f"an attention mask of shape {tuple(attention_mask.shape)}; with a cache it is "
                f"{tuple(whole.shape[:2])}, all tokens so far"
            )
        output: Tensor | None = None
        if self.deep_prompts is None and not torch.is_grad_enabled():
            found = list(self._updates())
            factors = [each for _, pair in found for each in pair]
            adapter = self.passes.adapter([update for update, _ in found], factors, has_prompts=False)
            output = cache.run(whole, attention_mask, new, adapter)
        return self(whole, attention_mask)[:, -new:] if output is None else output

    def _updates(self) -> Iterator[tuple[LowRank, tuple[nn.Parameter, nn.Parameter]]]:
        """The low-rank updates that peft has put on the products, and their parameters."""
        for index, layer in enumerate(self):
            for name in PROJECTIONS:
                part, _, product = name.partition(".")
                parent = getattr(layer, part, None)
                module = None if parent is None else getattr(parent, product, None)
                if module is not None and type(module) is not RemoteLinear:
                    yield from _updates_of(module, self.span.start + index, name)


def _updates_of(
    module: Any, block: int, projection: str
) -> Iterator[tuple[LowRank, tuple[nn.Parameter, nn.Parameter]]]:
    """The active updates of one wrapped product.

    Raises:
        LocalError: It is wrapped in something else than LoRA, or in a variant of it.
    """
    where = f"block {block}, {projection}"
    if not hasattr(module, "lora_A"):
        raise LocalError(
            f"{where} is wrapped in a {type(module).__name__}; on the swarm, products take LoRA "
            "(peft.LoraConfig), and prompts need no wrapping"
        )
    if module.merged:
        raise LocalError(f"{where}: its adapter is merged into weights that are not here; unmerge it")
    if module.disable_adapters:
        return
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        _check_plain(module, adapter, where)
        down, up = module.lora_A[adapter], module.lora_B[adapter]
        dropout = module.lora_dropout[adapter]
        rate = float(dropout.p) if module.training and isinstance(dropout, nn.Dropout) else 0.0
        update = LowRank(block, projection, down.weight.shape[0], float(module.scaling[adapter]), rate)
        yield update, (cast(nn.Parameter, down.weight), cast(nn.Parameter, up.weight))


def _check_plain(module: Any, adapter: str, where: str) -> None:
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None or getattr(module, "use_dora", {}).get(adapter):
        name = "DoRA" if variant is None else type(variant).__name__
        raise LocalError(
            f"{where}: {name} needs the product's own weights, which are not here; use plain LoRA"
        )
    if module.lora_B[adapter].bias is not None or module.lora_A[adapter].bias is not None:
        raise LocalError(f"{where}: biases of an adapter do not run on the swarm; set lora_bias to False")
