"""Train a classification head on SmolLM2, whose blocks stay with a swarm, by transformers' Trainer.

    pip install "p2pinfer[hf]"
    python examples/classify_texts.py [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Without --bootstrap, three nodes are started on this machine if the model is a folder. Blocks and embedding do
not change; the head is trained here, so that nothing comes back through the blocks. The task is made up by
this script: whether a sentence is about food, the weather or an animal.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from p2pinfer.hf import DistributedModelForSequenceClassification

LABELS = ("food", "weather", "animal")
WHO = ("My sister", "The old man", "Our teacher", "A friend of mine", "The boy next door", "Everybody here")
WHAT = {
    "food": ("bakes bread", "likes hot soup", "eats an apple", "cooks rice", "has cheese", "wants pizza"),
    "weather": (
        "hears thunder",
        "sees the snow",
        "hates rain",
        "enjoys the sun",
        "fears the storm",
        "feels wind",
    ),
    "animal": ("feeds a cat", "has a dog", "rides a horse", "saw an owl", "keeps rabbits", "chases ducks"),
}
WHEN = ("every morning", "today", "at home", "in the village", "again", "on Sunday")
UNSEEN = 2  # things of each kind that are asked about and never shown


def sentences(*, shown: bool) -> list[tuple[str, int]]:
    """Sentences with the number of their label, in a random order."""
    made = [
        (f"{who} {what} {when}.", number)
        for number, label in enumerate(LABELS)
        for what in (WHAT[label][:-UNSEEN] if shown else WHAT[label][-UNSEEN:])
        for who in WHO
        for when in WHEN
    ]
    random.Random(0).shuffle(made)
    return made


def right(model: Any, tokenizer: Any, texts: list[tuple[str, int]]) -> float:
    """Share of texts whose likeliest label is theirs."""
    found = 0
    for start in range(0, len(texts), 32):
        part = texts[start : start + 32]
        asked = tokenizer([text for text, _ in part], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"]).logits
        found += int((logits.argmax(-1) == torch.tensor([label for _, label in part])).sum())
    return found / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    parser.add_argument("--bootstrap", action="append", default=[], help="a peer of a swarm to join")
    parser.add_argument("--texts", type=int, default=192, help="that it learns from")
    parser.add_argument("--out", type=Path, default=Path("classifier"))
    arguments = parser.parse_args()
    started = time.monotonic()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = DistributedModelForSequenceClassification.from_pretrained(
        arguments.model,
        bootstrap=arguments.bootstrap,
        dtype="float32",
        config_changes={"num_labels": len(LABELS), "pad_token_id": tokenizer.pad_token_id},
    )
    for name, each in model.named_parameters():
        each.requires_grad_(name.startswith("score"))
    asked = sentences(shown=False)[:96]
    before = right(model, tokenizer, asked)
    rows = [{**tokenizer(text), "labels": label} for text, label in sentences(shown=True)[: arguments.texts]]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(arguments.out),
            per_device_train_batch_size=16,
            num_train_epochs=2,
            learning_rate=3e-3,
            save_strategy="no",
            logging_steps=4,
            report_to=[],
            use_cpu=True,
        ),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=rows,
    )
    trainer.train()
    model.save_pretrained(arguments.out)
    after = right(model, tokenizer, asked)
    print(f"sentences about things that were never shown: {before:.0%} right before, {after:.0%} after")
    print(f"{arguments.out} holds the head; {time.monotonic() - started:.0f} s in all")
    model.close()


if __name__ == "__main__":
    main()
