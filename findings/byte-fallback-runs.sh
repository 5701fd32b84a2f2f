#!/usr/bin/env bash
# One would guess: bytes that are no UTF-8 are decoded as everywhere else: what is valid before them stays, and each bad
# sequence becomes one U+FFFD. The ByteLevel decoder (GPT-2, Llama 3, Qwen) does so.
# So it is not for the ByteFallback decoder (Llama 2, Mistral, Gemma): a run of byte tokens is valid as a whole or not
# at all. One bad byte turns every byte of its run into U+FFFD, the complete characters before it included. Text that
# was printed token by token is thus taken back by a token that comes later, and a prefix of the ids does not decode
# to a prefix of the text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet tokenizers==0.23.3
cat >"$work/look.py" <<'PY'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

print("tokenizers", tokenizers.__version__)
text, bad = "né€".encode(), b"\xff"


def decoded(kind: str, data: bytes) -> str:
    """What `Tokenizer.decode` makes of one token a byte."""
    if kind == "ByteFallback":
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        ids, decoder = [1 + byte for byte in data], decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:  # ByteLevel writes each byte as a character; those that print stand for themselves
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letter = {byte: chr(byte) for byte in shown}
        letter |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letter)}
        assert set(letter.values()) == set(pre_tokenizers.ByteLevel.alphabet())
        pieces = ["<unk>", *letter.values()]
        ids, decoder = [pieces.index(letter[byte]) for byte in data], decoders.ByteLevel()
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoder
    return backend.decode(ids)


for kind in ("ByteLevel", "ByteFallback"):
    print(f"{kind:12} whole {decoded(kind, text)!r}, with a bad byte behind it {decoded(kind, text + bad)!r}")
assert decoded("ByteLevel", text + bad) == (text + bad).decode(errors="replace") == "né€\ufffd"
assert decoded("ByteFallback", text) == "né€", "valid runs are decoded otherwise now"
assert decoded("ByteFallback", text + bad) == "\ufffd" * len(text + bad), "a bad byte spoils less now"
PY
"$work/venv/bin/python" "$work/look.py"
