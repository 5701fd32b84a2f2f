"""Parts of a model that a client runs itself: tokenizer, embedding and head, and a draft model.

A client that holds no weights has the tokenizer alone, and imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from p2pinfer.client_config import ClientConfig
from p2pinfer.errors import LocalError
from p2pinfer.generation.trip_cost import Crowd
from p2pinfer.models.checkpoint.source import ModelSource, bundled_drafter_of
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import free_memory, refusals_named
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.chat_template import ChatTemplate, load_chat_template
from p2pinfer.models.text.generation_file import FILE as GENERATION_FILE
from p2pinfer.models.text.generation_file import GenerationDefaults, read_generation_defaults
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from p2pinfer.generation.draft_model import DraftModel
    from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead

logger = logging.getLogger(__name__)

_BYTES_PER_WEIGHT: Final = 8  # float32, to look rows up in, and packed for the product


@dataclass(frozen=True, slots=True)
class LocalModel:
    """The tokenizer, how the model's files ask for text to be generated, and what runs here."""

    embedding_and_head: EmbeddingAndHead | None  # None: the first hop embeds, and the last one draws
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    chat_template: ChatTemplate | None = None
    draft_model: DraftModel | None = None
    crowd: Crowd = field(default_factory=Crowd)  # of the texts that are generated with it

    @property
    def ends(self) -> EmbeddingAndHead:
        """Embedding and head; LocalError if there are none."""
        if self.embedding_and_head is None:
            raise LocalError("this client holds no weights, which this needs: leave out --thin (client.thin)")
        return self.embedding_and_head


def settled(config: ClientConfig, spec: ModelSpec) -> ClientConfig:
    """`config` with `thin` decided: `auto` holds no weights where they do not fit."""
    if config.thin != "auto":
        return config
    needed = spec.vocab_size * spec.hidden_size * _BYTES_PER_WEIGHT
    if config.device not in ("auto", "cpu") or needed < (free := free_memory().bytes):
        return replace(config, thin="off")
    logger.warning(
        "embedding and head of %s take %.1f GiB, and %.1f GiB are free: the first hop embeds, and the last "
        "one draws, so both read the text",
        spec.model,
        needed / 2**30,
        free / 2**30,
    )
    return replace(config, thin="on")


def load_local_model(
    source: ModelSource,
    config: ClientConfig,
    progress: Progress | None,
    find: Callable[[str], ModelSource],
) -> LocalModel:
    """Fetch and load what a client needs of a model; this may take minutes.

    Args:
        find: Gives the source of the draft model that `config` names.

    Raises:
        ConfigError: The draft model has another tokenizer.
        LocalError: There is no memory for it.
    """
    if config.thin == "on":
        folder = source.fetch_words(progress=progress)
        return LocalModel(None, load_tokenizer(folder), _defaults_of(folder), load_chat_template(folder))
    # torch, which takes 200 MB and seconds to import
    from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
    from p2pinfer.models.compute.target import choose_target

    compute = ComputeConfig(dtype=config.dtype, device=config.device)
    checkpoint = source.fetch(None, embedding_and_head=True, progress=progress)
    folder = checkpoint.folder
    defaults = _defaults_of(folder)
    device = choose_target(compute, checkpoint.spec.dtype).device
    with refusals_named(
        f"embedding and head of {checkpoint.spec.model}",
        [device],
        "free some memory, raise the limit, or --thin",
    ):
        ends, tokenizer = load_embedding_and_head(checkpoint, compute), load_tokenizer(folder)
        template = load_chat_template(folder)
    name = _draft_name(folder, config)
    draft = load_draft_model(find(name), source, tokenizer, compute, progress) if name else None
    return LocalModel(ends, tokenizer, defaults, template, draft)


def load_draft_model(
    draft: ModelSource,
    source: ModelSource,
    tokenizer: Tokenizer,
    compute: ComputeConfig,
    progress: Progress | None,
) -> DraftModel:
    """Fetch and load a model that guesses the tokens of another one, whose `tokenizer` that is.

    Raises:
        ConfigError: It has another tokenizer.
        LocalError: There is no memory for it.
    """
    from p2pinfer.generation.draft_model import DraftModel, check_tokenizers
    from p2pinfer.models.compute.blocks import load_blocks
    from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
    from p2pinfer.models.compute.target import choose_target

    spec = draft.spec
    span = BlockSpan(0, spec.num_blocks)
    checkpoint = draft.fetch(span, embedding_and_head=True, progress=progress)
    check_tokenizers(spec.model, load_tokenizer(checkpoint.folder), source.spec.model, tokenizer)
    target = choose_target(compute, spec.dtype)
    with refusals_named(
        f"the draft model {spec.model}", [target.device], "take a smaller one, or --draft off"
    ):
        blocks = load_blocks(checkpoint, span, target, progress=progress)
        return DraftModel(blocks, load_embedding_and_head(checkpoint, compute), source.spec.vocab_size)


def _defaults_of(folder: Path) -> GenerationDefaults:
    defaults = read_generation_defaults(folder)
    if defaults.left_out:
        logger.warning(
            "%s sets %s, which p2pinfer ignores: the text may differ from that of transformers",
            folder / GENERATION_FILE,
            ", ".join(defaults.left_out),
        )
    return defaults


def _draft_name(folder: Path, config: ClientConfig) -> str:
    """Name of the draft model that is asked for, for the model in `folder`; empty if there is to be none."""
    if config.speculate == "off" or config.draft == "off":
        return ""
    return bundled_drafter_of(folder) if config.draft == "auto" else config.draft
