"""Writes docs/models.md: what is run, and each sentence that refuses a config, as the code says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pinfer.errors import CheckpointError
from p2pinfer.models.configs.defaults import ACTIVATIONS, complete_config
from p2pinfer.models.configs.family_rules import FAMILIES

SLIDING, FULL = "sliding_attention", "full_attention"

# A family, and what its config.json says beyond its defaults.
REFUSED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("qwen3_5", {}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
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

p2pinfer reads config.json as transformers 5.24 does and computes what its eager models compute. In float32
the greedy tokens are equal. `make docs` writes this page.

## Families

Each row was written by `make families`. It gives a tiny model of each config random weights, and compares
its greedy tokens in float32 with those of transformers. They go over 1 to 4 hops of uneven spans, with
prompts in chunks of 1 to 36 tokens, three sessions in a batch, and once more with the steps that a GPU
records. Each option that is named changes transformers' own logits. Here it gives the same tokens.
"Tokens" are those compared, and all were equal. The last column is the largest difference of a logit.

| `model_type` | options tried beside the family's own | tokens | logits differ by |
| --- | --- | --- | --- |
{parity}

- The default of each config key is taken from transformers' classes by
  `scripts/write_family_defaults.py`. A test holds each of their fields to be read, refused or without
  effect.
- For six of them, tests/models/compute/test_config_options.py tries every field in old and new spellings.
- transformers calls a "mistral" with `layer_types` "ministral"; p2pinfer accepts both names.
- **Audits** work for all of them, as does **training** of prompts. **LoRA** changes the products that
  peft knows by the names `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` and `down_proj`,
  and no others. So BLOOM, Falcon and GPT-NeoX take none, and those that join some of these take it in
  part. An adapter of other products is refused.
- **Mixtures of experts** decode with ordinary kernels on a GPU, and not with recorded steps.
- **`phi3` with `longrope`**: transformers computes all keys again when a text passes the original length.
  A hop cannot, so such a text ends there, at 4,096 tokens.
- **`falcon` with ALiBi**: transformers' eager attention adds the slopes twice. p2pinfer computes what its
  SDPA attention does.
- **`gpt_oss`**: experts in MXFP4, as published, are laid out in bfloat16, which holds each of their
  numbers exactly.
- What keeps a recurrent state, attends to latent vectors or chosen keys, or passes more than hidden
  states from block to block is refused with that reason.

## Bundled models

- `tiny-stories`: a Llama of 10.4 M parameters that writes little stories. `benchmarks/tiny_stories/` trains
  it.
- `tiny-stories-drafter`: 1.8 M parameters (3.6 MB) that guess the tokens of `tiny-stories`, see
  [generation.md](generation.md). `benchmarks/tiny_drafter/` distils it from `tiny-stories` alone, on texts
  that this model writes. It chooses the same token in 91 % of cases greedily, and in 78 % at a temperature of
  0.7.

## Quantised weights: `p2pinfer node --weights FORMAT`

A node may hold its weights in fewer bits than it computes in. It quantises a checkpoint while loading,
tensor by tensor.

| format | bits a weight | error of a weight | what it is |
| --- | --- | --- | --- |
| `int8` | 8 | 0.8 % | a scale for each row |
| `int4` | 4.5; on a CPU 5 | 8.2 % | for each 32 numbers a scale of five bits, the best of five |
| `nf4` | 4.5 | 9.2 % | bitsandbytes' codes, a scale for each 64 numbers, rounded to bfloat16 |

- **What is quantised**: the products of the blocks. Norms, biases and the routers of experts stay as they
  are, and so do embedding and head, which clients hold.
- **What it computes in**: bfloat16, unless `--dtype` says otherwise. Products add up in float32.
- **Kernels**: on NVIDIA cards two of ours in Triton, which torch brings. Triton needs a C compiler there
  once. On CPUs torch's own kernels for int8 and int4. A node tests each before it announces. It says which
  one is wrong or missing, and then lays each weight out anew for every step, which is slow. nf4 on a CPU
  always does.
- **Audits** quantise the same checkpoint in the same way, and judge a node by that. A node that computes
  with other bits than it announces, more or fewer, is found as any other liar is.
- **Perplexity** of SmolLM2-135M-Instruct on 4,096 tokens of these pages: 49.8 in bfloat16, 50.0 in int8,
  57.5 in int4, 62.2 in nf4; with llama.cpp's Q8_0 49.8, with its Q4_0 59.2
  (`benchmarks/perplexity.py --windows 8`).
- **Routes** may mix nodes of different formats. A second opinion comes only from a node of the same format.

## Several cards: `p2pinfer node --device cuda:0,cuda:1`

One node of one span over both cards, or one node on each. Measured with the shape of Llama-3.1-70B: 80
blocks, random weights in bfloat16, 136.9 GB without embedding and head. Two H200 of one host, NVLink, torch
2.11, `python benchmarks/cards.py --part ids steps one each` beside other work on the host's processors. The
rows of transformers, int4 and the last table are of an earlier run, with transformers 5.24. The client was a
process of its own. Times are ms a token over loopback. "Of the floor" is the time to read all weights once at
the 4.3 TB/s that the first card read, over the time of a token.

| blocks | context | sessions | ms | tok/s together | times one | of the floor |
| --- | --- | --- | --- | --- | --- | --- |
| one node, over both cards | 512 | 1 | 43.5 | 23.0 | 1 | 0.76 |
| | 512 | 16 | 63.7 | 251 | 10.9 | |
| | 4,000 | 1 | 45.4 | 22.0 | 1 | 0.72 |
| | 4,000 | 16 | 92.0 | 174 | 7.9 | |
| two nodes, 0:40 and 40:80 | 512 | 1 | 45.6 | 21.9 | 1 | 0.72 |
| | 512 | 16 | 88.7 | 181 | 8.2 | |
| | 4,000 | 1 | 47.2 | 21.2 | 1 | 0.70 |
| | 4,000 | 16 | 113.7 | 141 | 6.6 | |
| no network, 0:40 and 40:80 | 512 | 1 | 40.4 | | | 0.80 |
| | 512 | 16 | 49.3 | | | |
| | 4,000 | 1 | 41.5 | | | 0.78 |
| | 4,000 | 16 | 79.4 | | | |
| transformers, layers on both cards | 512 | 1 | 220 | 4.6 | | 0.14 |
| int4 on one card, 40.7 GiB, no network | 1,000 | 1 | 25.1 | 40.9 | | |

| a prompt of 2,047 tokens | s | of transformers (0.483 s) |
| --- | --- | --- |
| one node, chunks of 256 tokens (the default) | 0.660 | 0.73 |
| one node, chunks of 1,024 (`session.chunk_tokens`) | 0.561 | 0.86 |
| two nodes, chunks of 256 | 0.500 | 0.96 |
| two nodes, chunks of 1,024 | 0.579 | 0.83 |
| int4 on one card, no network | 0.702 | 0.69 |

- **Met**: 0.7 of the floor for one node at both lengths, 0.7 of transformers' prefill, ten times one
  session's tokens with sixteen at 512 tokens on one node.
- **Missed**: a second node costs 2.1 ms a token at 512 tokens of context and 1.8 at 4,000; the goal was 1.0 a
  hop. At 4,000 tokens sixteen sessions stay below ten times one, and with two nodes at either length. 8 to 10
  ms of each of those tokens were the client's with one node, 24 to 29 with two.
- **Where the rest goes**: for sixteen sessions of 4,096 tokens, a block's keys and values are gathered in 420
  microseconds, and attended to in 90.
- **Correct**: on both cards, and on one that is named twice, the greedy tokens of every family equal those of
  transformers in float32 (tests/models/compute/test_cuda.py), and so do those of the 1024x16 shape, one node
  over both cards (`--part ids`). In bfloat16, one node and two gave the same first eight tokens of a session.
- **Audits**: 0 of 1,856 honest checks of the bundled model failed, with peers over both cards and on
  processors, judged on processors (`benchmarks/calibrate_audit.py --device cpu cuda:0,cuda:1`).
- **Not run to the end**: the benchmark of liars with nodes on both cards
  (`benchmarks/liars.py --cheat --device cuda:0 cuda:1 cuda:0,cuda:1`). A dozen nodes shared the cards at that
  moment, the first ones had taken most of the memory for their caches, and others found none. The run of six
  honest nodes was stopped early: of 29 audits all had passed, and nobody was banned.
- **Not run**: more than two cards, cards of different kinds, `cuda:0,cpu` on a card.

## Published quantised checkpoints

Folders and models of the hub whose config.json has a `quantization_config` are read in these formats. Each
weight is laid out while it is loaded, as the format's own definition says, and held in the dtype of the
computation. `--weights int4` quantises it again, so that it takes 4 bits in memory as well.

| `quant_method` | read | refused by name |
| --- | --- | --- |
| `gptq` | 2, 4 and 8 bits, `gptq` and `gptq_v2`, any order of groups | 3 bits, Marlin |
| `awq` | 4 bits, `gemm` | `gemv` and others |
| `fp8` | blocks of any size, also where they end within; scales in float32 or exponents | without blocks |
| `bitsandbytes` | nf4 and fp4, scales quantised or not; 8 bits | |
| `compressed-tensors` | 4 and 8 bits packed, 8 bits and FP8 by tensor, row, block | sparsity, NVFP4, mixed |
| `mxfp4` | of gpt-oss | others |

- Quantised activations and caches are not computed; the scales for them are left alone.
- The format's settings are part of the model's revision, as the files are.
- transformers 5.24 lays out FP8 wrongly without a word where a side is no multiple of a block.

## GGUF files

`--model FILE.gguf` works as a folder does; of a file in parts, name any part. A span reads its own
tensors and no others.

- **Architectures**: `llama` (Mistral's too), `qwen2` and `qwen3`. Others, mixtures of experts, and
  settings that nothing here computes are refused by name.
- **Types**: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K, so Q4_K_M, Q5_K_M and
  their like. The numbers are those of the package `gguf` to the bit.
- **Memory**: each tensor is laid out in the dtype of the computation while it is loaded. A span takes as
  much as one of a 16-bit checkpoint, and for a moment one more product.
- **Llama 3's scaling** lies in the file as a tensor of divisors (`rope_freqs.weight`), and is honoured.
- **The tokenizer** is made of the file for the rules `gpt-2`, `llama-bpe`, `qwen2` and `smollm`. With
  other rules, put the model's tokenizer.json beside the file; it counts more than what is made.
- **Audits**: the file's hash is the model's revision, so peers of one file serve each other and nobody
  else's. They announce the dtype that they compute in. An audit lays out the same file in float32 and in
  bfloat16.

## Models from peers: `--model swarm:REVISION`

Peers of a swarm give each other weights. A model is named by its content: the revision that a node prints,
and that `p2pinfer models show` prints where the model is.

- **A node** fetches what its blocks need, from several peers at once. Each mebibyte is checked before it is
  written, and each file by its SHA-256. It needs no access to the hub.
- **A client** needs the tokenizer too, which a revision does not cover. So it takes the longer name,
  `swarm:REVISION-WORDS`, after `p2pinfer models pull swarm:REVISION-WORDS`.
- **Order**: of a model of the hub, nodes of the local network come first, then the hub, then other nodes.
- **What is given away**: `--share-weights open` is the bundled model, models that the hub gives without a
  password, and what came from peers. `all` is every model that the node runs.
- **Who vouches for a revision** is whoever told it to you. That many peers announce it proves nothing.

## Supported options of config.json

- **LM head.** `lm_head.weight` is used if the file contains it, even where `tie_word_embeddings` is true.
  With tied embeddings, a file may contain only the head or only the embedding; it is used for both. Without
  tied embeddings, both must be there, or the checkpoint is refused.
- **Biases** exist where the config says so (`attention_bias`, `mlp_bias`). The queries, keys and values of
  Qwen2 always have them. If the file contains none of them, they are zero. A bias that the config does not
  announce is refused, because transformers would ignore it.
- **Activations.** Element-wise functions without weights: {activations}.
- **Null** has the meaning that transformers gives it: no window, no soft cap, or a derived value. If
  transformers gives it none, it is refused.
- **Other keys** are ignored if neither the family nor the caches and masks of transformers read them.

## RoPE scaling and context length

The settings are read from `rope_scaling` if it is there and not empty, and else from `rope_parameters`.
`rope_theta` may stand inside or beside them; the type is called `type` or `rope_type`.
`original_max_position_embeddings` may be left out, or stand inside or beside them. The value beside them
takes precedence.

| type | longest text, in tokens | longest prompt, in tokens |
| --- | --- | --- |
| `default`, `llama3` | `max_position_embeddings` | the same |
| `linear`, `proportional` | `max_position_embeddings` x `factor` | the same |
| `yarn` | the original length x `factor`, or `max_position_embeddings` if that is more | the same |
| `dynamic` | `max_position_embeddings` x `factor` | `max_position_embeddings` |
| `longrope` | `max_position_embeddings` | the original length |

With `dynamic` and `longrope`, the rotation of a token depends on the length of the text when it is computed.
transformers rotates all tokens of a prompt by the prompt's length, and each later token by its own position.
What is cached stays as it was.

- **Prompts up to the original length** are rotated by position alone. Every hop knows the position, so the
  text equals that of transformers at any length.
- **Longer prompts** are refused. The rotation of each token would depend on where the prompt ends, and hops
  receive the prompt in chunks.

## Unsupported config.json options and their error messages

An option that would change the output and is not supported is refused by name:

| config.json says | p2pinfer says |
| --- | --- |
{refused}

Two kinds of weights are refused when they are loaded, by the tensor's name: those that the config does not
account for, and those stored in another dtype than float32, float16 or bfloat16.

## Differences from transformers in tokenization

p2pinfer takes token ids from tokenizer.json as it is written, because the model was trained with it.
transformers 5 rebuilds the tokenizer from its class, if tokenizer_config.json or `model_type` names one. It
then takes only the vocabulary and the merges from the file. If the class has another pre-tokenizer or
normaliser than the file, the ids differ: `Qwen2Tokenizer` splits numbers into digits, whatever the file says.

To get the ids of transformers, let it save the tokenizer:
`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`. With equal ids, the tokens that follow are
equal.
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


def parity_rows() -> list[str]:
    """The rows of the table of families."""
    table = json.loads(Path(__file__).with_name("family_parity.json").read_text(encoding="utf-8"))
    assert table.keys() == FAMILIES, "run `make families`"
    return [
        f"| `{family}` | {', '.join(row['options']) or 'none'} | {row['tokens']} | {row['logit']:g} |"
        for family, row in table.items()
    ]


def models() -> str:
    """The whole of docs/models.md."""
    return TEXT.format(
        parity="\n".join(parity_rows()),
        activations=", ".join(f"`{name}`" for name in sorted(ACTIVATIONS)),
        refused="\n".join(refused_rows()),
    )


if __name__ == "__main__":
    Path(__file__).with_name("models.md").write_text(models(), encoding="utf-8")
