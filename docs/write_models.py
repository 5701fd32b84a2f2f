"""Writes docs/models.md: what is run, and each sentence that refuses a config, as the code says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.defaults import ACTIVATIONS, FAMILIES, complete_config

SLIDING, FULL = "sliding_attention", "full_attention"

# A family, and what its config.json says beyond its defaults.
REFUSED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("phi3", {}),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}),
    ("gemma2", {"rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}}),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [2]}}),
    ("llama", {"per_layer_config": {"0": {"num_key_value_heads": 4}}}),
    ("gemma2", {"use_bidirectional_attention": True}),
    ("llama", {"is_causal": False}),
    ("llama", {"is_encoder_decoder": True}),
    ("llama", {"attention_chunk_size": 8192}),
    ("llama", {"kv_sharing_modes": ["reuse"]}),
    ("llama", {"sliding_window": 1024}),
    ("llama", {"layer_types": [SLIDING] * 32}),
    ("qwen2", {"layer_types": [SLIDING] * 32, "use_sliding_window": False}),
    ("gemma2", {"sliding_window": None}),
    ("llama", {"hidden_act": "prelu"}),
    ("llama", {"hidden_act": "xielu"}),
    ("qwen3", {"head_dim": None}),
    ("llama", {"num_attention_heads": 30, "num_key_value_heads": 8}),
    ("llama", {"rms_norm_eps": 0}),
)

TEXT = """\
# Models

p2pinfer reads config.json as transformers 5.24 does, and computes what its eager models compute. In float32
greedy tokens are equal; tests/models/compute/test_config_options.py compares logits and tokens for every
field of the config classes of these families, in old and new spellings. `make docs` writes this page.

Families, by `model_type`: {families}. A "mistral" that lists `layer_types` is what transformers calls
"ministral", and either name is understood.

## What counts

- **The head.** A file that holds `lm_head.weight` is run with it, also where `tie_word_embeddings` is true.
  Where it is true and the file holds one of head and embedding, that is both. Where it is false and one is
  missing, the checkpoint is refused.
- **Biases** exist where the config says so (`attention_bias`, `mlp_bias`; queries, keys and values of Qwen2
  always have some). If the file holds none of them they are zero. A bias that the config does not announce is
  refused: transformers would leave it out.
- **Activations** that are a function of a number alone: {activations}.
- **Null** is what transformers makes of it: no window, no soft cap, a value that is derived. Where it makes
  nothing of it, it is refused.
- **Keys that neither the family nor transformers' caches and masks read** mean nothing.

## Rotary embeddings and the length of a text

Settings are read from `rope_parameters`, or from `rope_scaling` if that is there and not empty, with
`rope_theta` in it or beside it, `type` or `rope_type`, and `original_max_position_embeddings` beside it
(which wins), in it, or left out.

| type | longest text | longest prompt |
| --- | --- | --- |
| `default`, `llama3` | `max_position_embeddings` | the same |
| `linear`, `proportional` | `max_position_embeddings` x `factor` | the same |
| `yarn` | the original length x `factor`, or `max_position_embeddings` if that is more | the same |
| `dynamic` | `max_position_embeddings` x `factor` | `max_position_embeddings` |
| `longrope` | `max_position_embeddings` | the original length |

`dynamic` and `longrope` turn a token by the length of the text at the time when it is computed. transformers
turns all of a prompt by the prompt's length, each later token by its own position, and leaves what is cached
as it was. A prompt up to the original length is turned by position alone, so every hop knows how, and the
text that follows equals that of transformers at any length. The tokens of a longer prompt would have to know
where the prompt ends; hops are sent it in pieces, so such prompts are refused.

## What is refused

Everything that would change the numbers and is not computed, by name:

| config.json says | p2pinfer says |
| --- | --- |
{refused}

Weights that the config does not account for are refused when they are loaded, by the tensor's name; so are
weights stored in another dtype than float32, float16 or bfloat16.

## Where the text may differ from that of transformers

Token ids come from tokenizer.json, as it is written. transformers 5 builds the tokenizer anew from its class
where tokenizer_config.json names one (or `model_type` implies one, as for Qwen2), and takes vocabulary and
merges alone from the file. If the file's pre-tokenizer or normaliser is another than the class builds,
transformers gives other ids for the same text: `Qwen2Tokenizer` splits digits one by one, whatever the file
says. tokenizer.json is what the model was trained with, so it is followed here. To have the ids of
transformers, let it save the tokenizer (`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`);
with equal ids the tokens that follow are equal.
"""


def sentence(family: str, said: Mapping[str, Any]) -> str:
    """What refuses such a config."""
    try:
        complete_config("MODEL", {"model_type": family, **said})
    except CheckpointError as refusal:
        return str(refusal)
    raise AssertionError(f"a {family} with {said} is not refused")


def refused_rows() -> list[str]:
    """The rows of the table of refusals."""
    rows: list[str] = []
    for family, said in REFUSED:
        shown = json.dumps({"model_type": family, **said})[1:-1].replace(
            f'"{SLIDING}", ' * 31, f'"{SLIDING}", ... '
        )
        rows.append(f"| `{shown}` | {sentence(family, said)} |")
    return rows


def models() -> str:
    """The whole of docs/models.md."""
    return TEXT.format(
        families=", ".join(f"`{family}`" for family in sorted(FAMILIES)),
        activations=", ".join(f"`{name}`" for name in sorted(ACTIVATIONS)),
        refused="\n".join(refused_rows()),
    )


if __name__ == "__main__":
    Path(__file__).with_name("models.md").write_text(models(), encoding="utf-8")
