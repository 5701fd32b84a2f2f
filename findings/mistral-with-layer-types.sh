#!/usr/bin/env bash
# One would guess: `model_type` in config.json decides which class transformers loads, and a key that the class does
# not read changes nothing.
# So it is: with `layer_types` in the config, "mistral" is loaded as Ministral by AutoModelForCausalLM. Blocks whose
# type is full_attention then have no window, while MistralForCausalLM gives every block the window. The same file has
# two meanings, and they part as soon as a text is longer than the window.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.24.0
cat >"$work/look.py" <<'PY'
import json, pathlib, sys, warnings

warnings.simplefilter("ignore")
import torch
import transformers
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "torch", torch.__version__.split("+")[0])
folder = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
config = MistralConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=99, sliding_window=8, pad_token_id=0, initializer_range=0.3,
)
MistralForCausalLM(config).save_pretrained(folder)
path = folder / "config.json"
path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": ["full_attention"] * 4}))
ids = torch.arange(1, 41)[None]
auto = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
named = MistralForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
with torch.no_grad():
    apart = (auto(ids).logits - named(ids).logits)[0].abs().amax(-1)
print("AutoModelForCausalLM gives", type(auto).__name__, "and MistralForCausalLM", type(named).__name__)
inside, outside = float(apart[:8].max()), float(apart[8:].max())
print("largest difference of logits: within the window", f"{inside:.1e}", "and past it", f"{outside:.1f}")
assert type(auto).__name__ == "MinistralForCausalLM", "it is loaded as another class now"
assert inside < 1e-3 < 0.1 < outside, "the two agree now"
PY
"$work/venv/bin/python" "$work/look.py" "$work/model"
