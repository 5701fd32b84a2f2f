"""Teach the bundled model to tell a story's hero by name, with transformers' Trainer and peft, over a swarm.

    pip install "p2pinfer[hf]"
    python examples/tune_tiny_stories.py

Without --bootstrap, three nodes are started on this machine. The blocks stay with them and do not change.
LoRA's A and B are trained here. The task is made up by this script: each story begins with a name and an
animal, and the model learns to go on with one fixed sentence about both.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from p2pinfer.hf import DistributedModelForCausalLM

NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy", "Tim", "Sue")
ANIMALS = ("cat", "dog", "bird", "fish", "frog", "bear", "duck", "pig", "cow", "bee")
UNSEEN = (("Lucy", "frog"), ("Sam", "duck"), ("Mia", "bear"))  # pairs that it is asked about and never shown


def prompt(name: str, animal: str) -> str:
    return f"{name} has a {animal}."


def answer(name: str, animal: str) -> str:
    return f" The {animal} loves {name} very much. The end."


def tokenized(tokenizer: Any, name: str, animal: str) -> dict[str, list[int]]:
    """A text whose labels are those of its answer only."""
    asked = tokenizer(prompt(name, animal))["input_ids"]
    told = tokenizer(answer(name, animal), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": asked + told, "labels": [-100] * len(asked) + told}


def ask(model: Any, tokenizer: Any, name: str, animal: str) -> str:
    """What the model goes on with."""
    ids = torch.tensor([tokenizer(prompt(name, animal))["input_ids"]])
    with torch.no_grad():
        told = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bootstrap", action="append", default=[], help="a peer of a swarm to join")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("tuned-tiny-stories"))
    arguments = parser.parse_args()
    started = time.monotonic()
    model = DistributedModelForCausalLM.from_pretrained(bootstrap=arguments.bootstrap)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    before = [ask(model, tokenizer, *each) for each in UNSEEN]

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    tuned = peft.get_peft_model(model, config)
    pairs = [(name, animal) for name in NAMES for animal in ANIMALS if (name, animal) not in UNSEEN]
    random.Random(0).shuffle(pairs)
    trainer = transformers.Trainer(
        model=tuned,
        args=transformers.TrainingArguments(
            output_dir=str(arguments.out),
            per_device_train_batch_size=16,
            num_train_epochs=arguments.epochs,
            learning_rate=5e-3,
            logging_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=[tokenized(tokenizer, *each) for each in pairs],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()
    tuned.save_pretrained(arguments.out)
    tuned.eval()
    right = 0
    for (name, animal), was in zip(UNSEEN, before, strict=True):
        told = ask(tuned, tokenizer, name, animal)
        right += told.strip() == answer(name, animal).strip()
        print(f"{prompt(name, animal)}\n   before: {was!r}\n   after:  {told!r}")
    print(f"{right} of {len(UNSEEN)} unseen answers are as taught; {time.monotonic() - started:.0f} s in all")
    print(f"the adapter is in {arguments.out}")
    model.close()


if __name__ == "__main__":
    main()
