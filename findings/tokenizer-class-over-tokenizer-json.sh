#!/usr/bin/env bash
# One would guess: tokenizer.json is the whole tokenizer, so AutoTokenizer and tokenizers.Tokenizer.from_file give the
# same ids for the same folder; `tokenizer_class` only names a wrapper.
# So it is with PreTrainedTokenizerFast. With a class of a family, transformers 5 takes vocabulary and merges from the
# file and builds the pre-tokenizer anew from the class: Qwen2Tokenizer splits digits one by one whatever the file says.
# And where config.json beside it says "qwen2", that class is taken even if tokenizer_config.json names the generic one.
# A program that reads the file with `tokenizers` counts other tokens than one that uses transformers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet tokenizers==0.23.3 transformers==5.24.0
cat >"$work/look.py" <<'PY'
import json, os, pathlib, sys, warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.simplefilter("ignore")
import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "34", "1234"]
vocabulary = {piece: i for i, piece in enumerate(pieces)}
backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("3", "4"), ("12", "34")]))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
backend.save(str(folder / "tokenizer.json"))
by_file = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("1234").tokens


def by_transformers(family: str, name: str) -> list[str]:
    """The tokens of AutoTokenizer beside a config.json of that family, with that class in tokenizer_config.json."""
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": "<|end|>"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.convert_ids_to_tokens(tokenizer("1234").input_ids)


print("by the file:", by_file)
assert by_file == ["1234"]
for family, name, same in (
    ("llama", "PreTrainedTokenizerFast", True),
    ("llama", "Qwen2Tokenizer", False),
    ("qwen2", "PreTrainedTokenizerFast", False),
):
    tokens = by_transformers(family, name)
    print(f"model_type {family}, tokenizer_class {name}: {tokens}")
    assert (tokens == by_file) == same, "it is otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" "$work/model"
