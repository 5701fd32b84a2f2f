#!/usr/bin/env bash
# One would guess: whichever implementation of an optimizer changes a parameter in place, the parameter's version
# counter tells it, as after any other in-place operation, and so a cache of what was made from the parameter can be
# kept until the version changes.
# So it is for the loop and for foreach. The fused implementations of AdamW, SGD and Adagrad change the values, to the
# same ones, and leave the version as it was. transformers' Trainer uses fused AdamW unless told otherwise, so a change
# has to be found by comparing values.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.0
cat >"$work/look.py" <<'PY'
import torch
from torch.optim import SGD, Adagrad, AdamW

print("torch", torch.__version__.split("+")[0])
for kind in (AdamW, SGD, Adagrad):
    values = []
    for way in ("loop", "foreach", "fused"):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([parameter], lr=0.1, foreach=way == "foreach", fused=way == "fused")
        parameter.grad = torch.full((3,), 0.5)
        before = parameter._version
        optimizer.step()
        values.append(parameter.detach().clone())
        told = parameter._version != before
        print(f"{kind.__name__:8} {way:8} value {float(values[-1][0]):.4f}, version {before} -> {parameter._version}")
        assert told == (way != "fused"), "the version tells it otherwise now"
        assert float(values[-1][0]) < 1, "the step changed nothing"
    assert all(torch.allclose(value, values[0]) for value in values), "the ways part now"
PY
"$work/venv/bin/python" "$work/look.py"
