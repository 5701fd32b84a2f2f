#!/usr/bin/env bash
# One would guess: a KV cache only saves work, so one forward pass over a text and the same text token by token give the
# same logits but for rounding.
# So it is for every rope type but "dynamic", and for that one too while the text stays within the original length.
# Past it the base of the rotation follows the longest text seen, and keys in the cache keep the rotation that they
# were given, so the two ways part by far more than rounding, from the first position on: a whole pass turns even the
# first tokens by the base of the last.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.24.0
cat >"$work/look.py" <<'PY'
import warnings

warnings.simplefilter("ignore")
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "torch", torch.__version__.split("+")[0])
ids = torch.randint(1, 99, (1, 48), generator=torch.Generator().manual_seed(1))


def distance(rope: dict, tokens: int) -> float:
    """The largest difference of logits between one pass over some tokens and as many steps."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, max_position_embeddings=16, initializer_range=0.3, rope_parameters=rope,
    )
    models = []
    for _ in range(2):  # one each, since a model remembers the longest text it has seen
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(config).eval())
    with torch.no_grad():
        whole = models[0](ids[:, :tokens]).logits[0]
        cache, steps = None, []
        for position in range(tokens):
            out = models[1](ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, -1])
    return float((whole - torch.stack(steps)).abs().max())


for kind in ("default", "linear", "dynamic"):
    rope = {"rope_type": kind, "rope_theta": 10000.0} | ({} if kind == "default" else {"factor": 4.0})
    short, long = distance(rope, 16), distance(rope, 48)
    print(f"{kind:8} whole against token by token: {short:.1e} for 16 tokens, {long:.1e} for 48 (original length 16)")
    assert short < 1e-3, "they part within the original length now"
    assert (long > 0.1) == (kind == "dynamic"), "past the original length it is otherwise now"
PY
"$work/venv/bin/python" "$work/look.py"
