"""Models of a swarm for the Hugging Face libraries: `pip install "p2pinfer[hf]"`.

    from p2pinfer.hf import DistributedModelForCausalLM

    model = DistributedModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", bootstrap=["/dns4/..."])
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model(input_ids, labels=input_ids).loss.backward()

They are models of transformers whose blocks run on the swarm. Embedding and head are here, and so is all that
is trained.
"""

from __future__ import annotations

try:
    import transformers as transformers
except ImportError as exc:  # pragma: no cover - the tests install it
    raise ImportError("p2pinfer.hf needs transformers: pip install 'p2pinfer[hf]'") from exc

from .distributed_models import DistributedModelForCausalLM as DistributedModelForCausalLM
from .distributed_models import (
    DistributedModelForSequenceClassification as DistributedModelForSequenceClassification,
)
