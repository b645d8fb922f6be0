"""The model card: what was trained, on what, by which optimizer, and how it scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import TrainingArguments

_CARD = """---
{metadata}
---

# {name}

A `{model}` of {parameters:,} parameters, trained by hf_fngd's `recipes/{recipe}`.

| | |
|---|---|
{scores}

- data: {dataset}, {train_samples:,} training rows
- {length} in batches of {batch} ({processes} process(es), {accumulation} accumulation step(s)), schedule {schedule},
  gradient clipped at norm {clip:g}, seed {seed}
- optimizer: **{optimizer}**, with the arguments

```json
{optimizer_arguments}
```
"""
_SCORES = ("loss", "perplexity", "accuracy")


def render_card(report: dict[str, Any], args: TrainingArguments) -> str:
    """Write the card of a run.

    Args:
        report: What all_results.json holds of the run so far (no scores, on a card that goes with a checkpoint).
        args: The run's arguments: schedule, batch sizes, seed.

    Returns:
        The text of README.md, with the metadata that the Hub reads.
    """
    name = Path(args.output_dir).resolve().name
    metadata = ModelCardData(
        library_name="transformers", tags=["hf_fngd", report["optimizer"].lower()], model_name=name
    )
    scores = [f"| {key} | {value:.4f} |" for key, value in report.items() if key.rsplit("_", 1)[-1] in _SCORES]
    return _CARD.format(
        **{key: report[key] for key in ("model", "recipe", "parameters", "train_samples", "optimizer", "seed")},
        metadata=metadata.to_yaml(),
        name=name,
        scores="\n".join(scores) or "| not evaluated yet | |",
        dataset=f"`{report['dataset_name']}`" if report["dataset_name"] else "the embedded data of the recipe",
        length=f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        processes=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        schedule=args.lr_scheduler_type.value,
        clip=args.max_grad_norm,
        optimizer_arguments=json.dumps(report["optimizer_arguments"], indent=2),
    )
