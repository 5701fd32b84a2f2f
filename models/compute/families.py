"""Table of model families: the differences between their blocks, and nothing else.

A family is a row: where its norms stand, what its tensors are called, how its products are laid out. What a
config says in numbers (heads, windows, soft caps) is read from the config, which defaults.py makes complete
and `architecture.py` puts beside the row. So a family of known features costs a row here and one in
`checkpoint/family_rules.py`, and a checkpoint with a tensor that no rule consumes is refused when it is
loaded (weights.py), not run wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

Norms = Literal["rms", "layer"]
HeadNorms = Literal["", "each head", "all heads", "own of each head"]


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of the tensors of a family's mixture-of-experts layer.

    Attributes:
        fused: True if one tensor holds gate and up of all experts, and another one down: see
            `fused_experts.py`.
        shared: An expert that every token goes to.
        shared_gate: A product whose sigmoid that one's output is multiplied by.
        weighs_all: True if the weights of the chosen are those of the softmax over all experts; else they are
            scaled to a sum of 1, unless the config says otherwise.
        router_bias: Whether the router has one.
    """

    router: str
    expert: str  # with {} for the expert's number
    gate: str
    up: str
    down: str
    fused: bool = False
    shared: str = ""
    shared_gate: str = ""
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """Differences of a family's block from Llama's; the defaults are Llama's.

    Attributes:
        root: Prefix of every tensor but the head's.
        layers: Name of the blocks.
        embedding: Name of the embedding, as those of embedding norm, final norm and head.
        attention_norm: Norm before attention; None: there is none.
        mlp_norm: Norm before the feed-forward layer. None: there is none; in a parallel block attention's is
            used.
        attention_output_norm: Norm before the residual is added, as is `mlp_output_norm`.
        parallel: Whether the feed-forward layer sees the block's input, and not attention's output.
        norm: Kind of all norms.
        norm_bias: Whether they have biases.
        norm_offset: What the checkpoint leaves out of every norm's weight.
        head_norms: Which norm queries and keys get before they are rotated: of each head, of all heads
            together, or of each head with weights of its own.
        head_norm_names: Names of the two.
        qkv: Products of queries, keys and values; one name if they are stored as one.
        grouped: Whether that one has for each key head its queries, the key and the value.
        output: Product of what attention gives.
        sinks: Scores that join each head's softmax and take part of its weights.
        neighbours: Whether the two numbers of a rotated pair lie side by side, and not half a head apart.
        gate_up: Products of gate and up; one name if they are stored as one, or if there is no gate.
        down: Product of what they give.
        gated: Whether there is a gate.
        query_bias: Whether queries, keys and values have biases, whatever the config says.
        output_bias: Whether attention's output has a bias where queries have.
        bias_everywhere: Whether the feed-forward layer has biases where attention has.
        head_bias: Whether the LM head has one.
        scaled_embedding: Whether it is multiplied by the root of the hidden size.
        alibi: How the slopes of ALiBi are rounded, if the config asks for it.
        experts: Layout of its mixture.
    """

    root: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    embedding_norm: str | None = None
    final_norm: str = "norm"
    head: str = "lm_head"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    parallel: bool = False
    norm: Norms = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    head_norms: HeadNorms = ""
    head_norm_names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    grouped: bool = False
    output: str = "self_attn.o_proj"
    sinks: str = ""
    neighbours: bool = False
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gated: bool = True
    query_bias: bool = False
    output_bias: bool = True
    bias_everywhere: bool = False
    head_bias: bool = False
    scaled_embedding: bool = False
    alibi: Literal["", "exact", "bfloat16"] = ""
    experts: ExpertNames | None = None

    @property
    def block(self) -> str:
        """Prefix of a block's tensors, with {} for its number."""
        return f"{self.root}.{self.layers}.{{}}."


_MIXTRAL: Final = ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts.{}", "w1", "w3", "w2")
_QWEN_MOE: Final = ExpertNames("mlp.gate", "mlp.experts.{}", "gate_proj", "up_proj", "down_proj")
_GEMMA: Final = Family(norm_offset=1.0, scaled_embedding=True)
_GEMMA2: Final = replace(
    _GEMMA,
    mlp_norm="pre_feedforward_layernorm",
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
_OLMO2: Final = Family(
    attention_norm=None,
    mlp_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    head_norms="all heads",
)
_GLM: Final = Family(gate_up=("mlp.gate_up_proj",), neighbours=True, output_bias=False)
_COHERE: Final = Family(norm="layer", parallel=True, mlp_norm=None, neighbours=True)
_BLOOM: Final = Family(
    root="transformer",
    layers="h",
    embedding="word_embeddings",
    final_norm="ln_f",
    norm="layer",
    norm_bias=True,
    qkv=("self_attention.query_key_value",),
    grouped=True,
    output="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    gated=False,
    bias_everywhere=True,
)

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(experts=_MIXTRAL),
    "qwen2": Family(query_bias=True, output_bias=False),
    "qwen3": Family(head_norms="each head"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, head_norms="each head"),
    "phi3": Family(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    "phi": Family(
        norm="layer",
        norm_bias=True,
        parallel=True,
        mlp_norm=None,
        final_norm="final_layernorm",
        head_bias=True,
        output="self_attn.dense",
        gate_up=("mlp.fc1",),
        down="mlp.fc2",
        gated=False,
    ),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": Family(head_norms="all heads", experts=_QWEN_MOE),
    "granite": Family(),
    "qwen2_moe": Family(
        output_bias=False,
        experts=replace(_QWEN_MOE, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"),
    ),
    "qwen3_moe": Family(head_norms="each head", experts=_QWEN_MOE),
    "glm": _GLM,
    "glm4": replace(
        _GLM, attention_output_norm="post_self_attn_layernorm", mlp_output_norm="post_mlp_layernorm"
    ),
    "starcoder2": Family(
        norm="layer",
        norm_bias=True,
        gate_up=("mlp.c_fc",),
        down="mlp.c_proj",
        gated=False,
        bias_everywhere=True,
    ),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "falcon": replace(_BLOOM, alibi="bfloat16"),
    "bloom": replace(_BLOOM, embedding_norm="word_embeddings_layernorm", alibi="exact"),
    "gpt_neox": replace(
        _BLOOM,
        root="gpt_neox",
        layers="layers",
        embedding="embed_in",
        final_norm="final_layer_norm",
        head="embed_out",
        qkv=("attention.query_key_value",),
        output="attention.dense",
    ),
    "stablelm": Family(norm="layer", norm_bias=True, output_bias=False),
    "arcee": Family(gate_up=("mlp.up_proj",), gated=False),
    "seed_oss": Family(),
    "smollm3": Family(),
    "gpt_oss": Family(
        sinks="self_attn.sinks",
        experts=ExpertNames(
            "mlp.router",
            "mlp.experts",
            "gate_up_proj",
            "gate_up_proj",
            "down_proj",
            fused=True,
            router_bias=True,
        ),
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of a complete config's family, as the config's switches change it."""
    name: str = config["model_type"]
    family = FAMILIES[name]
    return _SWITCHED[name](family, config) if name in _SWITCHED else family


def _cohere(family: Family, config: Mapping[str, Any]) -> Family:
    return replace(family, head_norms="own of each head") if config["use_qk_norm"] else family


def _phi(family: Family, config: Mapping[str, Any]) -> Family:
    if not config["use_qk_norm"]:
        return family
    names = ("self_attn.q_layernorm", "self_attn.k_layernorm")
    return replace(family, head_norms="each head", head_norm_names=names)


def _falcon(family: Family, config: Mapping[str, Any]) -> Family:
    if config["new_decoder_architecture"] and config["num_ln_in_parallel_attn"] == 2:
        return replace(family, parallel=True, attention_norm="ln_attn", mlp_norm="ln_mlp")
    if config["new_decoder_architecture"] or config["parallel_attn"]:
        return replace(family, parallel=True, mlp_norm=None)
    return family


def _parallel(family: Family, config: Mapping[str, Any]) -> Family:
    """Parallel blocks, each part with a norm of its own."""
    return replace(family, parallel=True) if config["use_parallel_residual"] else family


def _stablelm(family: Family, config: Mapping[str, Any]) -> Family:
    return replace(family, parallel=True, mlp_norm=None) if config["use_parallel_residual"] else family


_SWITCHED: Final[Mapping[str, Callable[[Family, Mapping[str, Any]], Family]]] = {
    "cohere": _cohere,
    "falcon": _falcon,
    "gpt_neox": _parallel,
    "phi": _phi,
    "stablelm": _stablelm,
}
