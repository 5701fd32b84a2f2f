"""Models of further families whose blocks run on a swarm, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from p2pinfer.errors import LocalError

from ..models.families.parity import PROMPTS, write_model
from ..models.families.samples import SAMPLES
from .support import distributed

library: Any = transformers

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    "family", ["cohere2", "gemma3_text", "glm4", "granite", "olmo2", "phi3", "qwen3_moe", "starcoder2"]
)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    write_model(tmp_path, family, SAMPLES[family].config, prompts=0)
    ids = torch.tensor(PROMPTS[:1])
    auto = library.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        mine, other = distributed(tmp_path)(ids).logits, theirs(ids).logits
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_a_family_whose_parts_have_other_names_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "falcon", SAMPLES["falcon"].config, prompts=0)
    with pytest.raises(LocalError, match="other names than Llama's"):
        distributed(tmp_path)
