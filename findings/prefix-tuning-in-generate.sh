#!/usr/bin/env bash
# One would guess: what peft's prefix tuning learned holds wherever the wrapped model is called, `generate` as well as
# `forward`.
# So it is not with transformers 5.24: the prefix is handed over as `past_key_values`, `generate` hands over a cache of
# its own as `cache`, the new name of the same argument, and the old one is ignored with a warning of deprecation.
# `model.generate(...)` then gives, token for token, what the model without any prefix gives. `forward` keeps the
# prefix, and so does `generate(..., use_cache=False)` for the first token. A prompt (prompt tuning), which travels as
# embeddings, is not lost. So a loss that falls in training says nothing of what the tuned model will write.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.24.0 \
  peft==0.21.2
cat >"$work/look.py" <<'PY'
import warnings

import peft
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
NEW = 6
TEXT = torch.tensor([[1, 20, 30, 40, 50]])
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"vocab_size": 256, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def by_forward(model) -> list[int]:
    """Greedy tokens, the whole text computed for each."""
    ids = TEXT
    for _ in range(NEW):
        ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, -NEW:].tolist()


def by_generate(model, **options) -> list[int]:
    return model.generate(input_ids=TEXT, max_new_tokens=NEW, do_sample=False, **options)[0, -NEW:].tolist()


found = {}
with torch.no_grad():
    for kind, config in (("prefix", PrefixTuningConfig), ("prompt", PromptTuningConfig)):
        torch.manual_seed(1)
        base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
        model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=8)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 3)
        tuned, written, anew = by_forward(model), by_generate(model), by_generate(model, use_cache=False)
        with model.disable_adapter():
            plain = by_forward(model)
        print(f"{kind}: by forward {tuned}, by generate {written}, without a cache {anew}, untuned {plain}")
        found[kind] = tuned, written, anew, plain

tuned, written, anew, plain = found["prefix"]
assert tuned[0] != plain[0], "the prefix changes nothing here"
assert written == plain, "generate no longer loses the prefix"
assert anew[0] == tuned[0], "without a cache the prefix is lost as well"
tuned, written, anew, plain = found["prompt"]
assert tuned[0] != plain[0] and written[0] == anew[0] == tuned[0], "a prompt is lost now"
PY
"$work/venv/bin/python" "$work/look.py" 2>/dev/null
