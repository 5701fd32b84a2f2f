"""Models of transformers whose blocks run on a swarm.

`from_pretrained` makes transformers' own model of the family without layers, fills embedding, norm and head
from the checkpoint, and puts `RemoteLayers` in place of the layers. Loss, soft caps and generation stay
transformers'; only the loop over the layers is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from p2pinfer.errors import LocalError
from p2pinfer.folders import cache_folder, expand
from p2pinfer.loops.blocking import BlockingClient, connect
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.compute.architecture import describe_architecture
from p2pinfer.models.compute.embedding_and_head import embedding_and_head_names, names_of_ends
from p2pinfer.models.span import BlockSpan
from p2pinfer.options import ClientOptions

from .prefixes import prefix_of
from .remote_layers import RemoteLayer, RemoteLayers
from .remote_pass import RemotePasses
from .swarm_cache import SwarmCache

_IGNORED = -100  # transformers' label of what is not predicted
TRAINED_FILE = "trained.safetensors"
# Name of a cache in calls and outputs, which newer versions of transformers have shortened.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_ENDS = ("model", "layers", "embed_tokens", None, "norm")


class _Loader:
    """Makes the models of one `Auto` class."""

    auto: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = BUNDLED_MODEL,
        *,
        bootstrap: str | Sequence[str] = (),
        dtype: str | torch.dtype = "auto",
        deep_prompts: int = 0,
        config_changes: dict[str, Any] | None = None,
        swarm: BlockingClient | None = None,
        **options: Unpack[ClientOptions],
    ) -> Any:
        """A model of transformers whose blocks are those of a swarm.

        Args:
            model: A folder, a hub id, or the bundled model's name.
            bootstrap: As for `p2pinfer.connect`.
            dtype: Of embedding and head here, and of hidden states on their way to the first hop; that of
                the checkpoint by default.
            deep_prompts: Tokens of a trainable prompt for every block; 0: none.
            config_changes: Fields of the config that are set otherwise, such as `num_labels`.
            swarm: A client that is connected for this model already; closed by whoever made it.
            options: Anything else that `p2pinfer.connect` takes.

        Returns:
            A `transformers.PreTrainedModel`. `close()` leaves the swarm.

        Raises:
            LocalError: The model cannot be had, or this computer cannot hold embedding and head.
            PeerError: No bootstrap peer answers.
        """
        cache_dir = options.get("cache_dir")
        source = resolve_model(str(model), cache_dir=expand(cache_dir) if cache_dir else cache_folder())
        checkpoint = source.fetch(None, embedding_and_head=True)
        client = swarm or connect(model=model, bootstrap=bootstrap, **options)
        passes = RemotePasses(checkpoint.spec, client.trainer(), client.rows)
        made = _build(cls.auto, checkpoint, passes, dtype, config_changes or {})
        made.swarm = client
        made.owns_swarm = swarm is None
        if deep_prompts:
            made.model.layers.add_deep_prompts(deep_prompts)
        return made


class DistributedModelForCausalLM(_Loader):
    """A language model: `from_pretrained` gives one."""

    auto = "AutoModelForCausalLM"


class DistributedModelForSequenceClassification(_Loader):
    """A classifier of texts, whose head is new and trained here: `from_pretrained` gives one."""

    auto = "AutoModelForSequenceClassification"


def _build(
    auto: str, checkpoint: Checkpoint, passes: RemotePasses, dtype: str | torch.dtype, changes: dict[str, Any]
) -> Any:
    family = describe_architecture(checkpoint.config).family
    if (family.root, family.layers, family.embedding, family.embedding_norm, family.final_norm) != _ENDS:
        raise LocalError(
            f"{checkpoint.spec.model} is a {checkpoint.spec.family}, whose parts have other names than "
            "Llama's; transformers' classes are not made of it: use p2pinfer.Client"
        )
    library: Any = transformers
    config = library.AutoConfig.from_pretrained(checkpoint.folder)
    for name, value in changes.items():
        setattr(config, name, value)
    chosen = getattr(torch, checkpoint.spec.dtype) if dtype == "auto" else dtype
    chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    bare = copy.deepcopy(config)
    bare.num_hidden_layers = 0
    model = getattr(library, auto).from_config(bare, dtype=chosen)
    inner = model.model
    config.dtype = chosen
    config._name_or_path = (
        str(checkpoint.folder) if Path(checkpoint.folder).is_dir() else checkpoint.spec.model
    )
    model.name_or_path = config._name_or_path
    for part in (model, inner):
        part.config = config
    architecture = describe_architecture(checkpoint.config)
    span = BlockSpan(0, checkpoint.spec.num_blocks)
    layers = [RemoteLayer(architecture, chosen) for _ in range(span.start, span.stop)]
    inner.layers = RemoteLayers(layers, passes, span)
    inner.rotary_emb = nn.Identity()  # positions are turned where the blocks are
    _fill(model, checkpoint)
    own: Any = model.__class__
    model.__class__ = _subclass(own, _Distributed, forward=_checking(own.forward))
    inner.__class__ = _subclass(inner.__class__, _DistributedBase)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = _generation_config(library, checkpoint, config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)  # nothing of the blocks is here
    return model.eval()


def _generation_config(library: Any, checkpoint: Checkpoint, config: Any) -> Any:
    try:
        made = library.GenerationConfig.from_pretrained(checkpoint.folder)
    except OSError:
        made = library.GenerationConfig.from_model_config(config)
    return made


def _fill(model: Any, checkpoint: Checkpoint) -> None:
    """Copy embedding, norm and head out of the checkpoint."""
    ends = names_of_ends(describe_architecture(checkpoint.config).family)
    names = embedding_and_head_names(checkpoint)
    tables = [name for name in (ends.embedding, ends.head) if f"{name}.weight" in names]
    head = getattr(model, "lm_head", None)
    if head is not None and len(tables) == 2 and head.weight is model.model.embed_tokens.weight:
        # The files have both, and then both count, whatever the config says of tying.
        head.weight = nn.Parameter(torch.empty_like(head.weight))
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(checkpoint.read(f"{tables[0]}.weight"))
        for name in sorted(each for each in names if each.startswith(f"{ends.norm}.")):
            model.get_parameter(name).copy_(checkpoint.read(name))
        if head is not None:
            head.weight.copy_(checkpoint.read(f"{tables[-1]}.weight"))
            if f"{ends.head}.bias" in names:
                head.bias.copy_(checkpoint.read(f"{ends.head}.bias"))


_made: dict[tuple[type, type], type] = {}


def _subclass(base: type, mixin: type, **members: Any) -> type:
    """`base` with `mixin` before it; the same class each time."""
    if (base, mixin) not in _made:
        members["__module__"] = __name__
        _made[base, mixin] = type(f"Distributed{base.__name__}", (mixin, base), members)
    return _made[base, mixin]


def _checking(forward: Any) -> Any:
    """`forward` of a model with a head, which refuses labels that are to be predicted from padding.

    It has the same signature: transformers' `Trainer` looks there for the columns that a model takes.
    """

    @wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.dim() == mask.dim() == 2:
            mask = mask[:, -labels.shape[1] :]  # a prefix comes before
        if isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape:
            from_padding = (mask[:, :-1] == 0) & (labels[:, 1:] != _IGNORED)
            if bool(from_padding.any()):
                raise LocalError(
                    f"labels behind padded tokens: set them to {_IGNORED}, as transformers' collators do"
                )
        return forward(self, *args, **kwargs)

    return checked


class _DistributedBase(nn.Module):
    """The model below the head: embedding, blocks on the swarm, norm."""

    config: Any
    embed_tokens: nn.Embedding
    layers: RemoteLayers
    norm: nn.Module

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        output_router_logits: bool | None = None,
        **_: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states of all tokens; see `transformers`' model of the family.

        Raises:
            LocalError: Keys and values were given that are no prefix of all rows, as prefix tuning gives
                them, or the scores of routers are asked for.
        """
        if output_router_logits:
            raise LocalError("the scores of routers stay on the swarm: set output_router_logits to False")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        past: Any = cache if past_key_values is None else past_key_values  # by transformers' version
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        embedded: Tensor = inputs_embeds * getattr(self.config, "embedding_multiplier", 1)  # Granite's
        if not isinstance(past, SwarmCache):
            prefix = prefix_of(past, len(self.layers))
            hidden = self.norm(self.layers(embedded, attention_mask, position_ids, prefix))
            return MoeModelOutputWithPast(last_hidden_state=hidden)
        output = MoeModelOutputWithPast(
            last_hidden_state=self.norm(self.layers.go_on(embedded, attention_mask, past))
        )
        output[CACHE] = past
        return output


class _Distributed(nn.Module):
    """The model with its head."""

    swarm: BlockingClient
    owns_swarm: bool
    model: Any

    def save_pretrained(self, save_directory: str | Path, *_: Any, **__: Any) -> None:
        """Write the config, and the parameters here that are trained, to `trained.safetensors`.

        The blocks are not here. A model that peft has wrapped writes peft's files instead.
        """
        import safetensors.torch

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        trained = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        files: Any = safetensors.torch
        files.save_file(trained, folder / TRAINED_FILE, metadata={"format": "pt"})

    def load_trained(self, folder: str | Path) -> None:
        """Take in what `save_pretrained` wrote.

        Raises:
            LocalError: It is not of a model like this one.
        """
        import safetensors.torch

        files: Any = safetensors.torch
        trained: dict[str, Tensor] = files.load_file(Path(folder) / TRAINED_FILE)
        parameters = dict(self.named_parameters())
        if strange := sorted(trained.keys() - parameters.keys()):
            raise LocalError(f"{folder} has the parameter {strange[0]}, which this model has not")
        with torch.no_grad():
            for name, value in trained.items():
                parameters[name].copy_(value)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        # transformers' own hook: its caches are for keys and values that are here.
        prepare = vars(self).get("prepare_inputs_for_generation")
        if getattr(prepare, "__self__", self) is not self:
            # peft's, which puts virtual tokens before every step where it does not know a cache by its name
            # (0.21 does not know that of transformers 5.24, whose own models then go on with other texts).
            generation_config.use_cache = model_kwargs["use_cache"] = False
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = SwarmCache(self.model.layers.passes.open_rows)

    def close(self) -> None:
        """End its sessions on the hops; leave the swarm if `from_pretrained` joined it. Harmless twice."""
        self.model.layers.passes.trainer.close()
        if self.owns_swarm:
            self.swarm.close()
