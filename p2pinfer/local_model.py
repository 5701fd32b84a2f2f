"""Parts of a model that a client runs itself: embedding, head and tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from p2pinfer.models.checkpoint.source import ModelSource
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.compute.target import choose_target
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import refusals_named
from p2pinfer.models.progress import Progress
from p2pinfer.models.text.chat_template import ChatTemplate, load_chat_template
from p2pinfer.models.text.generation_file import FILE as GENERATION_FILE
from p2pinfer.models.text.generation_file import GenerationDefaults, read_generation_defaults
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """Embedding and head, the tokenizer, and how the model's files ask for text to be generated."""

    embedding_and_head: EmbeddingAndHead
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    chat_template: ChatTemplate | None = None


def load_local_model(source: ModelSource, compute: ComputeConfig, progress: Progress | None) -> LocalModel:
    """Fetch and load what a client needs of a model; this may take minutes.

    Raises:
        LocalError: There is no memory for it.
    """
    checkpoint = source.fetch(None, embedding_and_head=True, progress=progress)
    folder = checkpoint.folder
    defaults = read_generation_defaults(folder)
    if defaults.left_out:
        logger.warning(
            "%s sets %s, which p2pinfer ignores: the text may differ from that of transformers",
            folder / GENERATION_FILE,
            ", ".join(defaults.left_out),
        )
    device = choose_target(compute, checkpoint.spec.dtype).device
    with refusals_named(
        f"embedding and head of {checkpoint.spec.model}", device, "free some memory, or raise the limit"
    ):
        return LocalModel(
            load_embedding_and_head(checkpoint, compute),
            load_tokenizer(folder),
            defaults,
            load_chat_template(folder),
        )
